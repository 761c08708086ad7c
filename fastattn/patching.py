"""patch and unpatch: fused attention and LSTM inside a model that already exists.

A supported module keeps its identity and changes its class. Nothing is rebuilt, so whatever holds the module or its
state (parents that share it, DistributedDataParallel, hooks and their handles, optimizers, parametrisations, tied
parameters, a plain Python list) goes on holding the same object, and the root may itself be the module. ``unpatch``
gives the class back: the restored object is the original one.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fastattn.modules.attention import MultiheadAttention
from fastattn.modules.encoder import TransformerEncoder
from fastattn.modules.lstm import LSTM
from fastattn.modules.lstm_cell import LSTMCell

# Bound at import: a program may rebind torch.nn.MultiheadAttention to ours.
_TorchMultiheadAttention = nn.MultiheadAttention
_TorchTransformerEncoder = nn.TransformerEncoder

# Where the base class of transformers' models lives: none can be here before it has been imported.
_TRANSFORMERS = "transformers.modeling_utils"

# What a patched module remembers, in its __dict__, so that copies and pickles of it can be unpatched too.
_ORIGINAL_CLASS = "_fastattn_original_class"
_NESTED = "_fastattn_nested_encoder_class"

# A subclass may redefine these methods of torch's class and still compute what torch's class computes.
_HARMLESS = frozenset({"_reset_parameters", "reset_parameters", "flatten_parameters", "extra_repr"})
# Of the special names only these matter: they take part in a call, or in copying the class we make of a subclass.
_SPECIAL = frozenset(
    {"__call__", "__getattr__", "__getattribute__", "__getstate__", "__new__", "__reduce__", "__reduce_ex__"}
)
# torch's classes and ours; _patched_classes has those made of subclasses, too.
_SUPPORTED: dict[type[Any], type[Any]] = {
    _TorchMultiheadAttention: MultiheadAttention,
    nn.LSTM: LSTM,
    nn.LSTMCell: LSTMCell,
}
_patched_classes: dict[type[Any], type[Any]] = dict(_SUPPORTED)


@dataclass
class PatchReport:
    """What ``patch`` did: names of the modules that now run on fastattn, and of those that do not, with the reason."""

    replaced: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        # The root itself has the empty name.
        lines = [f"replaced {len(self.replaced)}, skipped {len(self.skipped)}"]
        lines += [f"  replaced {name or '(the model itself)'}" for name in self.replaced]
        lines += [f"  skipped  {name or '(the model itself)'}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def patch(model: nn.Module, need_weights: bool | None = None) -> PatchReport:
    """Make every supported module inside ``model`` compute on fastattn, in place.

    Supported are nn.MultiheadAttention, nn.LSTM and nn.LSTMCell, subclasses of them that change nothing of their
    computation, and Hugging Face models of a verified architecture (see ``fastattn.integrations.huggingface``), which
    are switched through their configuration. Parameters, buffers, hooks and the modules themselves stay the same
    objects. Patching again changes nothing but ``need_weights``.

    A patched nn.LSTM is a fastattn.LSTM, an nn.RNNBase but no nn.LSTM any more: TorchDynamo refuses that class. A
    subclass of nn.LSTM keeps its class, and with it the refusal.

    An nn.TransformerEncoder that leaves padding out in inference, by nested tensors, goes on doing so around patched
    layers on the CPU, and gives 0 at padding: see ``fastattn.modules.encoder``.

    Args:
        model: any module: nested, with shared modules, on any device, wrapped, or an attention module itself.
        need_weights: False tells the patched nn.MultiheadAttention modules that their callers throw the weights away,
            so that none are computed and None is returned in their place; True computes them whatever the caller
            says; None does what each call asks for. Hugging Face models ask with ``output_attentions``.

    Returns the report of what was replaced and what was not, with the reason; a shared module stands under its first
    name.

    Raises TypeError for another kind of argument.
    """
    _check_model(model)
    if need_weights is not None and not isinstance(need_weights, bool):
        raise TypeError(f"need_weights: got {type(need_weights).__name__}, expected True, False or None")
    report = PatchReport()
    for name, module in model.named_modules():
        reason = _why_not(module)
        if reason is not None:
            report.skipped[name] = reason
        elif _supported(module) is not None:
            _switch(module)
            report.replaced.append(name)
        if need_weights is not None and _ORIGINAL_CLASS in module.__dict__ and isinstance(module, MultiheadAttention):
            module.need_weights = need_weights
    _keep_padded(model)
    if _TRANSFORMERS in sys.modules:
        from fastattn.integrations import huggingface

        replaced, skipped = huggingface.patch_models(model)
        report.replaced += replaced
        report.skipped |= skipped
    return report


def unpatch(model: nn.Module) -> list[str]:
    """Undo ``patch``: every module inside ``model`` that was patched is what it was before, parameters untouched.

    Modules built as ``fastattn.MultiheadAttention`` or ``fastattn.LSTM`` stay; a model that was never patched is left
    as it is.

    Returns the names of the restored modules.

    Raises TypeError when ``model`` is not a module.
    """
    _check_model(model)
    restored = []
    for name, module in model.named_modules():
        if _ORIGINAL_CLASS in module.__dict__:
            original = module.__dict__.pop(_ORIGINAL_CLASS)
            for name_of_ours in ("need_weights", "__module__"):
                module.__dict__.pop(name_of_ours, None)
            _set_class(module, original)
            restored.append(name)
        if _NESTED in module.__dict__:
            module.__class__ = module.__dict__.pop(_NESTED)
            module.__dict__.pop("__module__", None)
            module.use_nested_tensor = True
    if _TRANSFORMERS in sys.modules:
        from fastattn.integrations import huggingface

        restored += huggingface.unpatch_models(model)
    return restored


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")


def _supported(module: nn.Module) -> type[Any] | None:
    """The class of torch's that has ours in its place, of which ``module`` is one; None for any other module."""
    return next((cls for cls in _SUPPORTED if isinstance(module, cls)), None)


def _why_not(module: nn.Module) -> str | None:
    """Why a module stays as it is; None for one that can be switched, and for one that is none of the supported."""
    if isinstance(module, torch.jit.ScriptModule):
        scripted = getattr(module, "original_name", "") in {cls.__name__ for cls in _SUPPORTED}
        return "compiled by TorchScript; patch the model before scripting it" if scripted else None
    if isinstance(module, tuple(_SUPPORTED.values())):
        return "already fastattn"
    supported = _supported(module)
    if supported is None:
        return None
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    cls = _base_class(module)
    if cls.forward is not supported.forward:
        return f"{cls.__name__} has its own forward"
    overrides = sorted(
        name
        for parent in cls.__mro__[: cls.__mro__.index(supported)]
        for name in vars(parent)
        if hasattr(supported, name)
        and name not in _HARMLESS
        and (name in _SPECIAL or not name.startswith("__"))
    )
    if overrides:
        return f"{cls.__name__} overrides {', '.join(overrides)}, which may change what it computes"
    return None


def _base_class(module: nn.Module) -> type[Any]:
    """The module's class without the one that ``torch.nn.utils.parametrize`` put over it."""
    return type(module).__bases__[0] if is_parametrized(module) else type(module)


def _switch(module: nn.Module) -> None:
    original = _base_class(module)
    module.__dict__[_ORIGINAL_CLASS] = original
    _set_class(module, _patched_class(original))
    _stay_a_leaf(module, original)


def _stay_a_leaf(module: nn.Module, original: type[Any]) -> None:
    """torch.fx does not trace into a module that says it is of torch.nn, as the original does."""
    module.__dict__["__module__"] = original.__module__


def _set_class(module: nn.Module, cls: type[Any]) -> None:
    """Give the module the class ``cls``. A parametrisation's properties, in a class of their own, are put over it."""
    if is_parametrized(module):
        own = {name: value for name, value in vars(type(module)).items() if name not in ("__dict__", "__weakref__")}
        cls = type(type(module).__name__, (cls,), own)
    module.__class__ = cls


def _patched_class(cls: type[Any]) -> type[Any]:
    """Ours in the place of torch's ``cls``; for a subclass of torch's both, so that isinstance keeps holding."""
    if cls not in _patched_classes:
        supported = next(torchs for torchs in _SUPPORTED if issubclass(cls, torchs))
        ours = _SUPPORTED[supported]
        # Ours derives from torch's, except for the LSTM, where it has to come first to be found.
        bases = (cls, ours) if issubclass(ours, supported) else (ours, cls)
        namespace = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__reduce_ex__": _reduce}
        _patched_classes[cls] = type(cls.__name__, bases, namespace)
    return _patched_classes[cls]


def _reduce(module: nn.Module, _protocol: int) -> tuple[Any, ...]:
    """Pickle a patched subclass by the class it had: the class made for it cannot be found by its name."""
    return _rebuild, (module.__dict__[_ORIGINAL_CLASS],), module.__getstate__()


def _rebuild(cls: type[Any]) -> Any:
    patched: Any = _patched_class(cls)
    return patched.__new__(patched)


def _keep_padded(model: nn.Module) -> None:
    """Stop nn.TransformerEncoder from making nested tensors for our modules, and give it ours in their place.

    Its choice is made at construction. It hands the layers a layout of torch's own kernels; with our modules it goes
    round them, and an output may be cut to the longest sequence (pytorch#97111).
    """
    for encoder in model.modules():
        if (
            isinstance(encoder, _TorchTransformerEncoder)
            and getattr(encoder, "use_nested_tensor", False)
            and any(_ORIGINAL_CLASS in module.__dict__ for module in encoder.modules())
        ):
            encoder.__dict__[_NESTED] = type(encoder)
            encoder.use_nested_tensor = False
            if type(encoder) is _TorchTransformerEncoder:
                encoder.__class__ = TransformerEncoder
                _stay_a_leaf(encoder, _TorchTransformerEncoder)
