"""What modules and their parameters are called, learnt from torch's own global hooks.

A parent's name is learnt when a module becomes its child, a parameter's when it is put into a module; so parts that are
called without their root, such as a decoder of a VAE, have their whole name, and weights have theirs before they are
first used. Nothing is kept alive by it.
"""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

BLOCKS = "blocks"
"""Where wan21's models have their transformer blocks; streamed ones are copies that stand in no model."""


class ModuleNames:
    """Names of all modules that are built while it listens, and of those that it is shown.

    Args:
        device: whose parameters are of interest.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._parents: weakref.WeakKeyDictionary[nn.Module, list[tuple[weakref.ref[nn.Module], str]]]
        self._parents = weakref.WeakKeyDictionary()
        self._components: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._known: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._new_tensors: list[tuple[weakref.ref[nn.Module], str, weakref.ref[torch.Tensor]]] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Learns names inside."""
        with ExitStack() as stack:
            for handle in (
                register_module_module_registration_hook(self._child_came),
                register_module_parameter_registration_hook(self._tensor_came),
                register_module_buffer_registration_hook(self._tensor_came),
            ):
                stack.callback(handle.remove)
            yield

    def _child_came(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if child is None:
            return
        self._known.add(parent)
        others = [entry for entry in self._parents.get(child, []) if entry[0]() is not None]
        self._parents[child] = [*others, (weakref.ref(parent), name)]
        self.show(child)  # which may be a copy, whose own children came unseen

    def _tensor_came(self, module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        if tensor is not None and tensor.device == self._device:
            self._new_tensors.append((weakref.ref(module), name, weakref.ref(tensor)))

    def show(self, module: nn.Module) -> None:
        """Makes a module known that was not seen being built, such as a copy, with all below it."""
        if module not in self._known:
            self._known.add(module)
            for name, child in module.named_children():
                self._child_came(module, name, child)

    def path(self, module: nn.Module) -> tuple[nn.Module, str]:
        """The root above a module, and the module's name below it; a root's own name is empty.

        Of several parents the first counts that is still there: a slice of a list of layers is a new parent.
        """
        names: list[str] = []
        parent = self._parent(module)
        while parent is not None:
            module, name = parent
            names.append(name)
            parent = self._parent(module)
        return module, ".".join(reversed(names))

    def _parent(self, module: nn.Module) -> tuple[nn.Module, str] | None:
        for reference, name in self._parents.get(module, ()):
            parent = reference()
            if parent is not None:
                return parent, name
        return None

    def component(self, root: nn.Module) -> str:
        """The component of a root; empty if it was not loaded as one."""
        return self._components.get(root, "")

    def new_tensors(self, component: str) -> dict[int, list[tuple[str, torch.Tensor]]]:
        """Parameters and buffers that came since the last call and are still there, with their names, by address.

        Args:
            component: what the models are that they came to, if one was being loaded.
        """
        by_address: dict[int, list[tuple[str, torch.Tensor]]] = {}
        for owner, leaf, reference in self._new_tensors:
            module, tensor = owner(), reference()
            if module is None or tensor is None:
                continue
            is_there = getattr(module, leaf, None) is tensor
            if not is_there:
                continue
            root, path = self.path(module)
            if component:
                self._components[root] = component
            name = f"{path}.{leaf}" if path else leaf
            part = _here(tensor)
            by_address.setdefault(part.untyped_storage().data_ptr(), []).append((name, part))
        self._new_tensors = []
        return by_address


def _here(tensor: torch.Tensor) -> torch.Tensor:
    """What lies on this rank's device: of a sharded weight its share."""
    to_local = getattr(tensor, "to_local", None)  # of torch's DTensor, whose module takes long to import
    return tensor if to_local is None else to_local()
