"""What is built and installed is what the tree holds."""

import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("commands", "strategies", "callbacks", "plugins")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SHIPPED = {
    f"fulgurite/{path.relative_to(ROOT).as_posix()}"
    for package in PACKAGES
    for path in (ROOT / package).rglob("*")
    if path.suffix == ".py" or path.name == "py.typed"
}
MODULES = sorted(
    path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in SHIPPED if path.endswith(".py")
)
EXTRAS = ("jsonargparse", "matplotlib", "mlflow", "rich", "tensorboard", "tensorboardX", "torchdata", "wandb")

# Lightning and its own imports come first: they take what is installed.
WITHOUT_EXTRAS = """
import importlib, sys
import lightning.pytorch
extras, modules, root = sys.argv[1].split(","), sys.argv[2].split(","), sys.argv[3]
for name in [name for name in sys.modules if name.partition(".")[0] in extras]:
    del sys.modules[name]
sys.modules.update(dict.fromkeys(extras))  # None: an import raises
for name in modules:
    assert importlib.import_module(name).__file__.startswith(root), name
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist and the wheel made from it; of a copy, for setuptools packs what an old build left in `build/lib`."""
    source = tmp_path_factory.mktemp("source")
    for name in (*PACKAGES, "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    # The setuptools of this environment, where it has one, saves a download.
    isolation = ["--no-isolation"] if importlib.util.find_spec("setuptools") else []
    subprocess.run([sys.executable, "-m", "build", *isolation, source], check=True)
    return source / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_tree(wheel: zipfile.ZipFile) -> None:
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == SHIPPED, "a package of the tree is missing under [tool.setuptools] packages, or one is left over"


def test_wheel_and_sdist_carry_the_license(built: Path, wheel: zipfile.ZipFile) -> None:
    text = (ROOT / "LICENSE").read_bytes()
    (packed,) = (name for name in wheel.namelist() if name.endswith("/LICENSE"))
    assert wheel.read(packed) == text
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        member = sdist.extractfile(f"{path.name.removesuffix('.tar.gz')}/LICENSE")
        assert member is not None
        assert member.read() == text


def test_the_wheel_imports_without_any_extra(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    command = [sys.executable, "-c", WITHOUT_EXTRAS, ",".join(EXTRAS), ",".join(MODULES), tmp_path]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports(module: str) -> None:
    imported = importlib.import_module(module)
    assert Path(imported.__file__ or "").is_relative_to(ROOT), "another installation shadows the tree"
    assert all(hasattr(imported, name) for name in getattr(imported, "__all__", ()))


@pytest.mark.parametrize("package", PACKAGES)
def test_each_public_package_is_typed(package: str) -> None:  # a type checker looks in the roots alone
    assert f"fulgurite/{package}/py.typed" in SHIPPED


def test_the_installed_version_is_the_projects() -> None:
    assert importlib.metadata.version("fulgurite") == PROJECT["version"], "install again: `pip install -e .`"


@pytest.mark.parametrize("script", PROJECT["scripts"])
def test_each_console_script_has_its_function(script: str) -> None:
    (entry_point,) = importlib.metadata.entry_points(group="console_scripts", name=script)
    assert callable(entry_point.load())
