"""What the pages show happens: code runs, YAML trains, commands print it, and each method has its figure."""

import ast
import inspect
import json
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from textwrap import dedent
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.run import get_args_parser as torchrun_parser
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from fulgurite.plugins.comm import plan

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w+)\n(?P<body>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [dedent(match["body"]) for match in FENCE.finditer(page.read_text()) if match["language"] == language]


def each_page(language: str) -> pytest.MarkDecorator:
    shown = [page for page in PAGES if blocks(page, language)]
    return pytest.mark.parametrize("page", shown, ids=lambda page: page.stem)


# Python: a page's blocks run as shown, one after the other, with these names in the place of the reader's own.


class Classifier(LightningModule):
    """Any module: what a page leaves out of ``Model`` as yours, it inherits from here."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*(tensor[:1500] for tensor in digits())), batch_size=100, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*(tensor[1500:] for tensor in digits())), batch_size=100)


def digits() -> tuple[Tensor, Tensor]:
    """``(1797, 64)`` pixels in [0, 1], and what they show."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)


class ShortTrainer(Trainer):
    """Trains as the page says, on processors, in a few forked processes, and no longer than a test may take."""

    def __init__(self, **settings: Any) -> None:
        strategy = settings.get("strategy", "auto")
        if isinstance(strategy, str) and strategy != "auto":
            settings["strategy"] = f"{strategy}_fork"
        elif isinstance(strategy, DDPStrategy) and settings.get("devices") != 1:
            strategy._start_method = "fork"
        if "devices" in settings:
            settings["devices"] = min(settings["devices"] * settings.pop("num_nodes", 1), 6)
        if isinstance(settings.get("plugins"), ClusterEnvironment):
            del settings["plugins"]  # a cluster's, whose variables `test_launchers.py` gives it
        if "max_steps" in settings:
            settings["max_steps"] = min(settings["max_steps"], 120)
        else:
            settings["max_epochs"] = min(settings.get("max_epochs", 2), 2)
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        super().__init__(**{"accelerator": "cpu", "limit_val_batches": 1} | quiet | settings)


def readers_own() -> dict[str, Any]:
    names: dict[str, Any] = {name: Classifier() for name in ("model", "small", "large", "first", "second")}
    train_loader = names["model"].train_dataloader()
    return names | {
        "train_loader": train_loader,
        "val_loader": names["model"].val_dataloader(),
        "labels": digits()[1][:1500],
        "batch": next(iter(train_loader)),
        "module_fn": Classifier,
        "dataloader_fn": lambda context: train_loader,
    }


@each_page("python")
def test_python_runs_as_the_page_shows_it(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pl, "Trainer", ShortTrainer)
    names = readers_own()
    for block in blocks(page, "python"):
        before = dict(names)
        exec(compile(block, str(page), "exec"), names)
        made = {name: value for name, value in names.items() if before.get(name) is not value}
        if ".fit(" not in block:
            train(made, names)


def train(made: dict[str, Any], names: dict[str, Any]) -> None:
    """What a block has made and leaves to the reader to use; the module is the page's ``Model``, if it has one."""
    kind = names.get("Model", nn.Module)
    module = type("Whole", (kind, Classifier), {})() if issubclass(kind, LightningModule) else names["model"]
    if "trainer" in made or (made.get("Model") is kind and issubclass(kind, LightningModule)):
        made.get("trainer", ShortTrainer(max_steps=3)).fit(module)
    if "optimizer" in made:
        made["optimizer"].step(names.get("closure", partial(gradient, names["model"], names["batch"])))
    if "layer" in made:
        inputs = 10 if "Ring" in made else 64
        made["layer"](torch.rand(3, inputs)).square().sum().backward()
        assert all(param.grad is not None for param in made["layer"].parameters())


def gradient(module: Classifier, batch: list[Tensor]) -> Tensor:
    """What a closure does."""
    module.zero_grad()
    loss = cross_entropy(module(batch[0]), batch[1])
    loss.backward()
    return loss


# YAML: LightningCLI builds the classes that a block names, and trains with them.


@each_page("yaml")
def test_yaml_trains_as_the_page_shows_it(page: Path) -> None:
    for block in blocks(page, "yaml"):
        config = yaml.safe_load(block)
        if "trainer" not in config:
            continue  # of Kubernetes, or a file that another test reads
        config["trainer"] |= {"accelerator": "cpu", "logger": False, "max_steps": 2, "limit_val_batches": 1}
        if "strategy" in config["trainer"]:
            arguments = config["trainer"]["strategy"]["init_args"]
            arguments["start_method"] = "fork"
            config["trainer"] |= {"devices": 3, "max_steps": arguments.get("sync_every", 0) + 2}
        cli = LightningCLI(Classifier, args=config, run=False, save_config_callback=None)
        cli.trainer.fit(cli.model)
        objects = [cli.trainer.strategy, *cli.trainer.callbacks, *cli.trainer.optimizers, *cli.model.modules()]
        built = {type(thing).__name__ for thing in objects}
        assert {name.rpartition(".")[2] for name in re.findall(r"class_path: ([\w.]+)", block)} <= built


# Commands: a shell reads them, and what they name is there. The planner's output is the page's.

SENTENCE = re.compile(r"`(?P<command>(?:make|python|fulgurite-plan|pip install) [^`\n]+)`")
CONSOLE = re.compile(r"^\$ (?P<command>fulgurite-plan .*)\n(?P<output>(?:.*\n)*)")


def commands(page: Path) -> Iterator[list[str]]:
    for block in blocks(page, "bash"):
        for line in re.sub(r"\$\w+", "0", block.replace("\\\n", " ")).splitlines():
            yield shlex.split(line, comments=True)
    for match in SENTENCE.finditer(FENCE.sub("", page.read_text())):
        yield shlex.split(match["command"])


def unknown(words: list[str]) -> Iterator[str]:
    """What a command names and the repository does not have."""
    for place, word in enumerate(words):
        if word == "make" and place == 0:
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            yield from {name for name in words[1:] if name not in targets}
        elif extras := re.fullmatch(r"(?:\.|fulgurite)\[(.*)\]", word):
            known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            yield from set(extras[1].split(",")) - set(known)
        elif re.fullmatch(r"(?:examples|benchmarks|docs)/\w+\.(?:py|yaml)", word):
            if not (ROOT / word).exists():
                yield word
            elif word.endswith(".py"):
                flags = [flag.partition("=")[0] for flag in words[place + 1 :] if flag.startswith("--")]
                yield from (f"{flag} of {word}" for flag in flags if not knows(ROOT / word, flag[2:]))


def knows(script: Path, flag: str) -> bool:
    """Whether a script's ``main`` has the flag as an argument, or, under LightningCLI, its Trainer."""
    source = script.read_text()
    if "LightningCLI" in source:
        room, *name = flag.split(".")
        return room != "trainer" or name[0] in inspect.signature(Trainer).parameters
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return flag in {argument.arg for node in functions if node.name == "main" for argument in node.args.args}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_name_what_is_there(page: Path) -> None:
    for block in blocks(page, "bash"):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True, timeout=60)
    for words in commands(page):
        assert list(unknown(words)) == []
        if "torchrun" in words:
            torchrun_parser().parse_args(words[words.index("torchrun") + 1 :])  # exits where it knows a flag not
        if words[:1] == ["fulgurite-plan"]:
            plan.main(words[1:])


@each_page("console")
def test_the_planner_prints_what_the_page_shows(page: Path) -> None:
    for block in blocks(page, "console"):
        example = CONSOLE.fullmatch(block)
        assert example, "not of the form `$ fulgurite-plan ...` and what it prints"
        command = [sys.executable, "-m", "fulgurite.plugins.comm.plan", *shlex.split(example["command"])[1:]]
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        assert printed == example["output"]


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("make lint nothing", ["nothing"]),
        ("pip install '.[cli,none]'", ["none"]),
        ("python examples/nothing.py", ["examples/nothing.py"]),
        ("python examples/hessian_spectrum.py --seed 1 --none=2", ["--none of examples/hessian_spectrum.py"]),
        ("srun python examples/federated.py fit --trainer.none 1", ["--trainer.none of examples/federated.py"]),
    ],
)
def test_what_a_command_names_in_vain_is_found(command: str, missing: list[str]) -> None:
    assert list(unknown(shlex.split(command))) == missing


# Figures, and the ways to a method.

IMAGE = re.compile(r"!\[[^\]]+\]\((?P<path>[^)\s]+)\)")
LISTS = {"api", "changelog", "contributing"}  # nothing to see
NAV = yaml.load(re.sub(r"!!\S+", "", (ROOT / "mkdocs.yml").read_text()), yaml.SafeLoader)["nav"]
METHODS = {name: page for part in NAV for entry in part.get("Methods", []) for name, page in entry.items()}


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem.lower() not in LISTS], ids=lambda page: page.stem)
def test_each_page_has_a_figure(page: Path) -> None:
    figures = [page.parent / match["path"] for match in IMAGE.finditer(page.read_text())]
    assert figures, f"{page.name} shows nothing"
    assert all(figure.read_bytes().startswith(b"\x89PNG") for figure in figures)


@pytest.mark.slow
def test_the_pages_own_figures_can_be_drawn_again(tmp_path: Path) -> None:
    names = runpy.run_path(str(DOCS / "_figures.py"))
    names["main"](tmp_path)
    drawn = {figure.name for figure in tmp_path.iterdir() if figure.read_bytes().startswith(b"\x89PNG")}
    assert drawn == {f"{name}.png" for name in names["FIGURES"]}
    assert drawn <= {figure.name for figure in (DOCS / "assets").iterdir()}


@pytest.mark.parametrize("page", METHODS.values(), ids=METHODS)
def test_each_method_is_in_the_gallery_with_a_figure_of_its_page(page: str) -> None:
    cards = re.split(r"^- ", (DOCS / "gallery.md").read_text(), flags=re.MULTILINE)
    (card,) = (card for card in cards if f"]({page})" in card)
    figures = {match["path"] for match in IMAGE.finditer(card)}
    assert figures
    assert figures <= {match["path"] for match in IMAGE.finditer((DOCS / page).read_text())}
    assert "```" in card  # the one-line change


@pytest.mark.parametrize("page", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("start", ["README.md", "docs/index.md"])
def test_each_method_is_found_from_the_start(start: str, page: str) -> None:
    assert re.search(rf"\((?:docs/)?{page}[)#]", (ROOT / start).read_text())


@pytest.mark.slow
def test_the_search_finds_each_method_by_its_name(tmp_path: Path) -> None:
    for package in ("strategies", "callbacks", "plugins"):  # as `make links`
        link = ROOT / "build" / "types" / "fulgurite" / package
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(ROOT / package)
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path], cwd=ROOT, check=True, timeout=600
    )
    index = json.loads((tmp_path / "search" / "search_index.json").read_text())
    for name, page in METHODS.items():
        own = [entry for entry in index["docs"] if entry["location"].startswith(page.replace(".md", ".html"))]
        assert any(set(name.lower().split()) <= set(re.findall(r"[\w-]+", entry["title"].lower())) for entry in own)
