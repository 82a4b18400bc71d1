"""Classifiers of texts: a BERT or RoBERTa and its head, from Hugging Face's files.

Both heads are the same on the state of the first token, and differ in their names:
probabilities = softmax(W tanh(V s + v) + w), or a sigmoid where a text may have many labels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cosmos_jax import huggingface
from cosmos_jax.errors import UserError
from cosmos_jax.models.bert import Bert, BertConfig, Params, RobertaConfig, from_torch_names
from cosmos_jax.scores.embeddings import each_text, longest

# Model type -> PyTorch's names of V and W.
_HEADS = {
    "bert": {"dense": "bert.pooler.dense", "out": "classifier"},
    "roberta": {"dense": "classifier.dense", "out": "classifier.out_proj"},
}


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """A sequence classifier and its tokenizer.

    `params` has those of `models.bert.Bert` and of the head, NumPy fp32; `multi_label` says
    that the labels do not exclude each other; `fingerprint` is the SHA-256 of the weights.
    """

    name: str
    config: BertConfig
    params: Params
    tokenizer: Any
    labels: tuple[str, ...]
    multi_label: bool
    fingerprint: str

    def index(self, label: str) -> int:
        """The column of a label, given as its name or its number."""
        if label in self.labels:
            return self.labels.index(label)
        if label.isdecimal() and int(label) < len(self.labels):
            return int(label)
        raise UserError(
            f"classifier {self.name!r} has no label {label!r}; it has {', '.join(self.labels)}"
        )


def load(name: str) -> Classifier:
    """Reads the classifier called `name`: a directory or a Hugging Face id.

    Raises:
      UserError: the files cannot be found or read, are damaged, do not belong together, or
        hold no classifier.
    """
    directory = huggingface.locate(name, "classifier")
    with huggingface.errors_in(directory):
        content = huggingface.read_json(directory / "config.json")
        config = BertConfig.from_huggingface(content)
        special_tokens = ("cls", "sep", "pad")
        tokenizer = huggingface.read_tokenizer(directory, special_tokens, config.vocab_size)
        tensors, fingerprint = huggingface.read_tensors(directory)
        params = {"encoder": from_torch_names(config, tensors), "head": _head(config, tensors)}
    names = content.get("id2label") or {}
    count = len(params["head"]["out"]["bias"])
    return Classifier(
        name,
        config,
        params,
        tokenizer,
        tuple(names.get(str(i), f"LABEL_{i}") for i in range(count)),
        content.get("problem_type") == "multi_label_classification",
        fingerprint,
    )


def _head(config: BertConfig, tensors: Mapping[str, np.ndarray]) -> Params:
    width = config.hidden_size
    family = "roberta" if isinstance(config, RobertaConfig) else "bert"
    params: Params = {}
    for ours, theirs in _HEADS[family].items():
        for name in (f"{theirs}.weight", f"{theirs}.bias"):
            if name not in tensors:
                raise UserError(f"classifier weights: tensor {name} is missing")
        kernel = np.asarray(tensors[f"{theirs}.weight"], np.float32).T
        bias = np.asarray(tensors[f"{theirs}.bias"], np.float32)
        rows = width if ours == "dense" else len(bias)
        if kernel.shape != (width, rows) or bias.shape != (rows,):
            raise UserError(
                f"classifier weights: tensor {theirs}.weight has shape {list(kernel.shape[::-1])},"
                f" but an encoder of width {width} asks for {[rows, width]}"
            )
        params[ours] = {"kernel": np.ascontiguousarray(kernel), "bias": bias}
    if len(params["out"]["bias"]) < 2:
        raise UserError("classifier weights: one output is a regression; labels are needed")
    return params


def probabilities(classifier: Classifier, texts: Sequence[str]) -> np.ndarray:
    """The probability of each label for each text, [number of texts, number of labels].

    Raises:
      UserError: there are no texts, or one of them has no token.
    """
    function = functools.partial(
        _probabilities,
        classifier.config,
        classifier.multi_label,
        jax.device_put(classifier.params),
    )
    max_length = longest(classifier.tokenizer, classifier.config)
    return each_text(function, classifier.tokenizer, texts, max_length)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _probabilities(
    config: BertConfig, multi_label: bool, params: Params, ids_BxL: jax.Array, mask_BxL: jax.Array
) -> jax.Array:
    dense, out = params["head"]["dense"], params["head"]["out"]
    with jax.default_matmul_precision("float32"):
        states_BxLxD: Any = Bert(config).apply({"params": params["encoder"]}, ids_BxL, mask_BxL)
        hidden_BxD = jnp.tanh(states_BxLxD[:, 0] @ dense["kernel"] + dense["bias"])
        logits_BxC = hidden_BxD @ out["kernel"] + out["bias"]
    return jax.nn.sigmoid(logits_BxC) if multi_label else jax.nn.softmax(logits_BxC)
