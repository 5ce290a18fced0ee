"""The methods of the collection, told from their source: listing them imports neither torch nor Lightning."""

import ast
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

_KINDS = {
    "strategies": "strategy",
    "callbacks": "callback",
    "plugins.optim": "optimizer",
    "plugins.metrics": "metric",
    "plugins.equilibrium": "layer",
    "plugins.comm": "command",
}
_ROLE = re.compile(r":[a-z]+:`~?(?:\w+\.)*(\w+)`")


@dataclass(frozen=True)
class Method:
    """A method that a user can switch on.

    Args:
        names: what they write, such as the names by which a Trainer knows a strategy; blanks between them.
        path: module in ``fulgurite``, and class or function.
        page: under ``docs/``.
    """

    names: str
    path: str
    page: str

    @property
    def kind(self) -> str:
        """What it is to a Trainer."""
        return next(kind for package, kind in _KINDS.items() if self.path.startswith(f"{package}."))

    @property
    def summary(self) -> str:
        """First line of its docstring."""
        module, _, name = self.path.rpartition(".")
        tree = ast.parse(_source(module).read_text(encoding="utf-8"))
        definitions = [node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
        (found,) = (node for node in definitions if node.name == name)
        return _ROLE.sub(r"\1", (ast.get_docstring(found) or "").partition("\n")[0])


def _source(module: str) -> Path:
    package, *rest = module.split(".")
    spec = find_spec(f"fulgurite.{package}")  # of a longer name it would import the packages above
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent.joinpath(*rest).with_suffix(".py")


METHODS = (
    Method("streaming_diloco diloco", "strategies.streaming_diloco.StreamingDiLoCoStrategy", "streaming_diloco.md"),
    Method(
        "gradient_coding sr_sgc m_sgc",
        "strategies.sequential_gradient_coding.SequentialGradientCodingStrategy",
        "sequential_gradient_coding.md",
    ),
    Method("federated", "strategies.federated.FederatedStrategy", "federated.md"),
    Method(
        "federated_adversarial",
        "strategies.federated_adversarial.FederatedAdversarialStrategy",
        "federated.md#adversarial-clients",
    ),
    Method("client_app", "strategies.flower.client_app", "flower.md"),
    Method("server_app", "strategies.flower.server_app", "flower.md"),
    Method("GradientCoherence", "callbacks.gradient_coherence.GradientCoherence", "gradient_coherence.md"),
    Method("CoherentGradients", "callbacks.coherent_gradients.CoherentGradients", "gradient_coherence.md"),
    Method("HessianSpectrum", "callbacks.hessian_spectrum.HessianSpectrum", "hessian_spectrum.md"),
    Method(
        "CurvatureBatches",
        "callbacks.curvature_batches.CurvatureBatches",
        "gradient_regularized_newton.md#accumulated-batches",
    ),
    Method("JacobianHomeostasis", "callbacks.jacobian_homeostasis.JacobianHomeostasis", "jacobian_homeostasis.md"),
    Method("DaleLaw", "callbacks.dale_law.DaleLaw", "exponentiated_gradient.md#dalelaw"),
    Method("RobustValidation", "callbacks.robust_validation.RobustValidation", "federated.md#robust-validation"),
    Method(
        "GradientRegularizedNewton",
        "plugins.optim.gradient_regularized_newton.GradientRegularizedNewton",
        "gradient_regularized_newton.md",
    ),
    Method(
        "ExponentiatedGradient",
        "plugins.optim.exponentiated_gradient.ExponentiatedGradient",
        "exponentiated_gradient.md",
    ),
    Method("FedSpeed", "plugins.optim.fedspeed.FedSpeed", "fedspeed.md"),
    Method("FedSpeedServer", "plugins.optim.fedspeed.FedSpeedServer", "fedspeed.md"),
    Method("EquilibriumLayer", "plugins.equilibrium.layer.EquilibriumLayer", "jacobian_homeostasis.md"),
    Method("MCoherence", "plugins.metrics.coherence.MCoherence", "gradient_coherence.md"),
    Method("RobustAccuracy", "plugins.metrics.robust_accuracy.RobustAccuracy", "federated.md#robust-validation"),
    Method("fulgurite-plan", "plugins.comm.plan.plan", "plan.md"),
)


def listing() -> str:
    """Two lines a method: what it is, its names and its page; what it does."""
    rows = [f"{method.kind:10} {method.names:34} docs/{method.page}\n{'':10} {method.summary}" for method in METHODS]
    return "\n".join(rows)
