"""Networks of Hugging Face for the application; those of timm are made by timm itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from lightning_compress.core.errors import ConfigurationError, UnsupportedError


def hugging_face(
    auto_class: str = "AutoModelForSequenceClassification",
    *,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    **settings: Any,
) -> nn.Module:
    """Makes a model of transformers.

    Args:
        auto_class: Its class, or an Auto class.
        name: A folder that `save_pretrained` wrote, or the name of a model on the hub, which is downloaded.
        config: Without a name: the `model_type` and whatever else of its configuration; its weights are random then.
        **settings: More of the configuration, such as num_labels.

    Raises:
        UnsupportedError: If transformers is not installed.
        ConfigurationError: If there is no such class, or the model cannot be made.
    """
    try:
        import transformers  # noqa: PLC0415
    except ImportError as error:
        msg = "model=hugging_face needs transformers: pip install 'lightning_compress[huggingface]'."
        raise UnsupportedError(msg) from error
    found = getattr(transformers, auto_class, None)
    if found is None:
        msg = f"model.auto_class={auto_class!r}: transformers has no such class."
        raise ConfigurationError(msg)
    given = dict(config or {})
    try:
        if name is not None:
            return cast(nn.Module, found.from_pretrained(name, **settings))
        kind = given.pop("model_type", None)
        if kind is None:
            msg = "model=hugging_face needs model.name=FOLDER_OR_NAME, or model.config.model_type such as bert."
            raise ConfigurationError(msg)
        return cast(nn.Module, found.from_config(transformers.AutoConfig.for_model(kind, **given, **settings)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigurationError):
            raise
        msg = f"{auto_class} cannot be made of name={name!r}, config={dict(config or {})}: {error}"
        raise ConfigurationError(msg) from error
