"""Prediction heads of `adapters` as the heads of classes of transformers.

The library's AdapterModel classes have heads of a structure of their own, which a config describes.
Where a class of transformers has a head of the same structure, the tensors get its names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from compacter_kernels.checkpoints import names
from compacter_kernels.checkpoints.checkpoint import Checkpoint
from compacter_kernels.checkpoints.source import Source


class Head(NamedTuple):
    """A head of a class of transformers: its linear layers, and what lies between and before."""

    layers: tuple[str, ...]
    activation: str | None = None
    use_pooler: bool = False
    bias: bool = True

    @property
    def names(self) -> dict[str, str]:
        """Its linear layers by their names in a head of `adapters`.

        There each is preceded by dropout, and each but the last followed by the activation.
        """
        return {str(1 + 3 * number): name for number, name in enumerate(self.layers)}


AUTO_CLASSES = {
    "classification": "AutoModelForSequenceClassification",
    "multiple_choice": "AutoModelForMultipleChoice",
    "tagging": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "image_classification": "AutoModelForImageClassification",
}
_TAGS = {"tagging": Head(("classifier",)), "question_answering": Head(("qa_outputs",))}
_POOLED = Head(("classifier",), use_pooler=True)
_SEQ2SEQ = Head(("classification_head.dense", "classification_head.out_proj"), "tanh")
_FAMILIES = {
    "bert": {"classification": _POOLED, "multiple_choice": _POOLED, **_TAGS},
    "roberta xlm-roberta": {
        "classification": Head(("classifier.dense", "classifier.out_proj"), "tanh"),
        "multiple_choice": _POOLED,
        **_TAGS,
    },
    "electra": {"classification": Head(("classifier.dense", "classifier.out_proj"), "gelu"), **_TAGS},
    "distilbert": {"classification": Head(("pre_classifier", "classifier"), "relu"), **_TAGS},
    "bart mbart": {"classification": _SEQ2SEQ, "question_answering": _TAGS["question_answering"]},
    "t5": {"classification": _SEQ2SEQ, "question_answering": _TAGS["question_answering"]},
    "gpt2": {"classification": Head(("score",), bias=False), **_TAGS},
    "llama mistral": {"classification": Head(("score",), bias=False), "tagging": Head(("score",))},
    "vit": {"image_classification": Head(("classifier",))},
}
HEADS = {kind: heads for kinds, heads in _FAMILIES.items() for kind in kinds.split()}


def named_as_in_class(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], model_type: str | None
) -> dict[str, Tensor] | None:
    """The tensors of a head, given by their names in it, by those of a class of transformers.

    None: no class has a head of this structure.
    """
    head = HEADS.get(model_type or "", {}).get(str(config.get("head_type")))
    if head is None or config.get("layers") != len(head.layers):
        return None
    same = (
        bool(config.get("use_pooler", False)) == head.use_pooler
        and config.get("bias", True) == head.bias
        and not config.get("multilabel", False)
        and (len(head.layers) == 1 or config.get("activation_function") == head.activation)
    )
    named = {}
    for key, tensor in tensors.items():
        number, _, parameter = key.partition(".")
        if number not in head.names:
            return None
        named[f"{head.names[number]}.{parameter}"] = tensor
    return named if same and named else None


def described(config: Mapping[str, Any]) -> str:
    """What a head is, for a message."""
    parts = [f"{key}={config[key]!r}" for key in ("layers", "activation_function", "use_pooler") if key in config]
    return f"{config.get('head_type', 'of unknown structure')}{' with ' if parts else ''}{', '.join(parts)}"


def read_heads(source: Source, tensors: Mapping[str, Tensor], name: str, checkpoint: Checkpoint) -> None:
    """Take over the head of a class of transformers, or one of `adapters` of that structure."""
    head = source.head if "config" in source.config else tensors  # an adapter's folder has a file for the head
    checkpoint.copies = {key: tensor for key, tensor in head.items() if names.head_of(key)}
    flexible: dict[str, dict[str, Tensor]] = {}
    for key, tensor in {**source.head, **tensors}.items():
        if key.startswith("heads."):
            head_name, _, rest = key.removeprefix("heads.").partition(".")
            flexible.setdefault(head_name, {})[rest] = tensor
    others = set(getattr(getattr(source.model, "adapters_config", None), "adapters", ())) - {name}
    for head_name, parameters in flexible.items():
        if head_name in others:  # It belongs to another adapter, as this one has its name.
            continue
        config = _head_config(source, head_name)
        named = named_as_in_class(parameters, config, checkpoint.model["model_type"])
        head_type = str(config.get("head_type"))
        if named is None or head_name != name or checkpoint.copies:
            checkpoint.losses.append(
                f"prediction heads of `adapters` itself, for its model classes alone: {head_name}, {described(config)}"
            )
        else:
            checkpoint.copies = named
            label2id = config.get("label2id")
            labels = {number: label for label, number in label2id.items()} if isinstance(label2id, Mapping) else {}
            checkpoint.notes.append(
                f"the head is that of {AUTO_CLASSES[head_type]}, with num_labels={config.get('num_labels')}"
                f"{f' and id2label={labels}' if labels else ''}"
            )
    in_base = sorted(key for key in source.head if not names.head_of(key) and not key.startswith("heads."))
    if in_base:
        checkpoint.notes.append(f"{', '.join(in_base)}, saved as a head, is not taken over: it is part of the base")


def _head_config(source: Source, name: str) -> Mapping[str, Any]:
    """Return the library's config of one of its heads, empty if it is not there."""
    if source.model is not None:
        heads = dict(getattr(source.model, "heads", nn.ModuleDict()).named_children())
        config = getattr(heads.get(name), "config", None)
    else:
        saved = source.head_config
        config = saved.get("config") if saved.get("name") == name else None
    return config if isinstance(config, Mapping) else {}
