"""LoRA on the transformer: diffusers' calls, with what would pass in silence refused."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

# Pipelines ask the signature of `save_pretrained` which of their options a model takes.
_with_its_signature: Any = functools.wraps(ModelMixin.save_pretrained, assigned=())


class LatentDiTAdapterMixin(PeftAdapterMixin, AttentionMixin):
    """diffusers' adapters and fused projections, which exclude each other: a fused projection has no adapter."""

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """Add an adapter; see diffusers.

        Raises:
            ValueError: on fused projections, or after layerwise casting.
        """
        self._check_can_be_adapted()
        super().add_adapter(adapter_config, adapter_name)

    def load_lora_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Load a LoRA; see diffusers.

        Raises:
            ValueError: on fused projections, or after layerwise casting.
        """
        self._check_can_be_adapted()
        return super().load_lora_adapter(*args, **kwargs)

    def set_adapters(self, adapter_names: list[str] | str, weights: Any = None) -> None:
        """Activate adapters; see diffusers. A weight may be a dict by the names of modules.

        Raises:
            ValueError: for an adapter or a module that does not exist.
        """
        self._check_names(adapter_names)
        modules = [name for name, _ in self._modules_by_name()]
        for weight in weights if isinstance(weights, list) else [weights]:
            for key in weight if isinstance(weight, dict) else ():
                if not any(key == name or name.startswith(f"{key}.") or name.endswith(f".{key}") for name in modules):
                    raise ValueError(f"weights has {key!r}, which is not a module of this model")
        super().set_adapters(adapter_names, weights)

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Delete adapters; see diffusers.

        Raises:
            ValueError: for an adapter that does not exist.
        """
        self._check_names(adapter_names)
        super().delete_adapters(adapter_names)

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        """Merge adapters into the weights; see diffusers.

        Raises:
            ValueError: for an adapter that does not exist.
        """
        self._check_names(adapter_names or ())
        super().fuse_lora(lora_scale, safe_fusing, adapter_names)

    def fuse_qkv_projections(self) -> None:
        """Fuse the projections to queries, keys and values; see diffusers.

        Raises:
            ValueError: if adapters are attached.
        """
        if hasattr(self, "peft_config"):
            raise ValueError(
                f"fused projections would drop the attached adapters ({', '.join(self.peft_config)}): merge these "
                "first, by fuse_lora() and unload_lora()"
            )
        super().fuse_qkv_projections()

    @_with_its_signature
    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save the model; see diffusers.

        Raises:
            ValueError: if adapters are attached, under whose names of weights no model would load.
        """
        self.check_can_be_saved()
        return super().save_pretrained(*args, **kwargs)

    def check_can_be_saved(self) -> None:
        """Raise a ValueError if what `save_pretrained` writes would not load as this model."""
        if hasattr(self, "peft_config"):
            raise ValueError(
                f"adapters are attached ({', '.join(self.peft_config)}): save them by save_lora_adapter(), then call "
                "unload_lora() to save the model without them, or fuse_lora() and unload_lora() to save it with them"
            )
        if self._is_cast_by_layer():
            raise ValueError("layers are stored in fewer bits: save the model before enable_layerwise_casting()")

    def _check_can_be_adapted(self) -> None:
        if any(getattr(module, "fused_projections", False) for _, module in self._modules_by_name()):
            raise ValueError("adapters have no effect on fused projections: call unfuse_qkv_projections() first")
        if self._is_cast_by_layer():
            raise ValueError("add adapters before enable_layerwise_casting(), which would store them in fewer bits")

    def _check_names(self, adapter_names: Iterable[str] | str) -> None:
        """Raise a ValueError for an adapter that does not exist, with the names of those that do."""
        existing = getattr(self, "peft_config", {})
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name not in existing:
                raise ValueError(f"no adapter is named {name!r}; there are {', '.join(existing) or 'none'}")

    def _is_cast_by_layer(self) -> bool:
        # The registry and the name of the hook are private in diffusers 0.42.1.
        registries = (getattr(module, "_diffusers_hook", None) for _, module in self._modules_by_name())
        return any(registry is not None and registry.get_hook("layerwise_casting") for registry in registries)

    def _modules_by_name(self) -> Iterable[tuple[str, nn.Module]]:
        assert isinstance(self, nn.Module)
        return self.named_modules()
