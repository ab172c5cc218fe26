"""Every option of Photon, typed and documented once.

A recipe is a TOML file of these sections. Unknown keys and wrong types are refused (`photon.recipe` turns
pydantic's complaints into one sentence with the place, the nearest valid key and the allowed range).
Defaults suit a laptop; presets hold the paper's sizes.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
# Betas and momenta: at 1 an average never forgets its first value and never learns another.
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
# Far above any of use: it keeps a rate, and what schedules make of it, within float32.
Rate = Annotated[float, Field(ge=0.0, le=1e6)]
Device = Annotated[str, StringConstraints(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]
Auto = Literal["auto"]
# A name becomes a folder name and a wire identity: letters first, nothing a file system or a log could misread.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class Section(BaseModel):
    """A section of the recipe: closed (no unknown keys), strict (no silent conversion), immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _integers_are_floats(cls, data: object) -> object:
        """TOML writes `lr = 1`; a float field takes it. Booleans are never numbers."""
        if not isinstance(data, dict):
            return data
        out = dict(data)
        for name, field in cls.model_fields.items():
            value = out.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and field.annotation in _FLOATS:
                out[name] = float(value)
            elif isinstance(value, list) and field.annotation in _PAIRS:
                out[name] = tuple(float(v) if isinstance(v, int) and not isinstance(v, bool) else v for v in value)
        return out


class ModelConfig(Section):
    """The language model. Either our decoder (shape below) or any Hugging Face causal LM (`hf`)."""

    preset: str = Field("", description="Name of a shape (`photon presets`): sets the fields below unless given.")
    hf: str = Field("", description="Path or hub id of a Hugging Face causal LM to use instead of our decoder.")
    hf_weights: Literal["scratch", "pretrained"] = Field(
        "scratch", description="With `hf`: fresh weights of that architecture, or continued pre-training."
    )
    layers: Positive = Field(4, description="Transformer blocks.")
    width: Positive = Field(128, description="Model width (d_model).")
    heads: Positive = Field(4, description="Attention heads; must divide `width`.")
    kv_heads: Positive | None = Field(None, description="Key/value heads (grouped queries); default `heads`.")
    hidden: Positive | None = Field(
        None, description="MLP hidden width; default 4 x width (GELU) or 8/3 x width rounded up to 64 (SwiGLU)."
    )
    positions: Literal["rope", "alibi", "learned"] = Field("rope", description="Position information.")
    rope_theta: float = Field(10_000.0, gt=0, description="RoPE base frequency.")
    norm: Literal["layernorm", "rmsnorm"] = Field("layernorm", description="Normalisation (no bias).")
    activation: Literal["gelu", "swiglu"] = Field("gelu", description="MLP kind.")
    qk_norm: bool = Field(False, description="Normalise queries and keys per head before attention.")
    tied: bool = Field(True, description="Share the embedding with the output head.")
    init_std: float = Field(0.02, gt=0, description="Std of the initial weights; residual outputs / sqrt(2 layers).")

    @model_validator(mode="after")
    def _shape(self) -> Self:
        if self.hf and self.preset:
            raise ValueError("model.hf and model.preset each name a model: give one of them")
        if self.width % self.heads:
            raise ValueError(f"model.heads = {self.heads} must divide model.width = {self.width}")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"model.kv_heads = {self.kv_heads} must divide model.heads = {self.heads}")
        if self.positions == "rope" and (self.width // self.heads) % 2:
            raise ValueError("RoPE needs an even head width: model.width / model.heads")
        return self


class DataConfig(Section):
    """How each owner's text becomes batches. Nothing here names a text: that is `[[silo]]`."""

    dir: str = Field("data", description="Folder for the tokenizer and each silo's shards; reused between runs.")
    tokenizer: str = Field("train", description="`train` (byte-level BPE), or path or hub id of a Hugging Face one.")
    tokenizer_text: list[str] = Field(
        [], description="Train the tokenizer on these sources instead of the silos' own text (for owners far away)."
    )
    vocab_size: int = Field(
        4096,
        ge=257,
        le=2**32 - 1,
        description="Size of a trained vocabulary; with a given tokenizer, the least rows of the embedding (padding).",
    )
    tokenizer_bytes_per_silo: int = Field(
        4_000_000,
        ge=0,
        description="Text each silo gives to a trained tokenizer, shared by its sources (a vocabulary leaks words).",
    )
    sequence_length: int = Field(256, ge=2, description="Tokens per training sequence.")
    heldout_fraction: float = Field(0.05, gt=0, lt=0.5, description="Share of documents held out, by content hash.")
    max_bytes_per_silo: Positive | None = Field(
        None, description="Read so much of a silo's text, shared by its sources."
    )
    partition: Literal["owner", "iid"] = Field(
        "owner",
        description="Whose documents a node holds: its owner's, or an equal random share of all silos' (studies on one "
        "machine only: text leaves its owner).",
    )
    build_workers: Positive | Auto = Field("auto", description="Threads that tokenise (auto = number of cores).")

    @field_validator("tokenizer_text", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value


class NodeConfig(Section):
    """Local training on every LLM Node; a `[[silo]]` may override batch size, tau and device."""

    batch_size: Positive = Field(8, description="Sequences per local step (the paper: small).")
    micro_batch_size: Positive | Auto = Field("auto", description="Sequences per forward pass; auto = largest fitting.")
    optimizer: Literal["adamw", "muon", "sgd"] = Field("adamw", description="muon = Muon for matrices, AdamW else.")
    optimizer_state: Literal["keep", "reset"] = Field("keep", description="Local optimizer state between rounds.")
    lr: Rate = Field(3e-3, description="Peak learning rate (AdamW/SGD part).")
    muon_lr: Rate = Field(0.02, description="Peak learning rate of Muon's matrices.")
    muon_momentum: Decay = Field(0.95, description="Muon's Nesterov momentum.")
    momentum: Decay = Field(0.0, description="Momentum of SGD.")
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), description="AdamW's betas.")
    eps: float = Field(1e-8, ge=1e-30, description="AdamW's epsilon.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled weight decay on matrices.")
    clip_norm: float = Field(1.0, ge=0, description="Global gradient-norm clip; 0 = off.")
    schedule: Literal["constant", "cosine", "wsd"] = Field("cosine", description="Of the global sequential step.")
    warmup_steps: int = Field(0, ge=0, description="Linear warm-up, in sequential steps.")
    total_steps: Positive | None = Field(None, description="Schedule length; default rounds x tau.")
    final_lr_fraction: Fraction = Field(0.1, description="Learning rate at the end, as a share of the peak.")
    decay_fraction: Fraction = Field(0.6, description="wsd: share of the schedule that decays linearly.")
    device: Device = Field("auto", description="auto (every CUDA device, else CPU), cpu, mps, cuda or cuda:N.")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto = bfloat16 on CUDA.")
    compile: Literal["auto", "on", "off"] = Field("auto", description="torch.compile; auto = on CUDA only.")
    workers: Positive | Auto = Field("auto", description="Local fabric: processes; auto = one per GPU or CPU core.")
    threads: Positive | Auto = Field("auto", description="CPU threads per process; auto = cores // workers.")


class FederationConfig(Section):
    """Rounds: who takes part, for how long, and how updates are merged."""

    rounds: Positive = Field(10, description="Exchanges.")
    tau: Positive = Field(32, description="Local steps between exchanges.")
    nodes_per_round: Positive | None = Field(None, description="K of the P nodes sampled each round; default all.")
    oversample: float = Field(
        0.0,
        ge=0,
        le=4,
        description="Ask this share of K more nodes to train; the first K usable replies make the round.",
    )
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Study's tool: each sampled node misses the round with this probability; at least one stays.",
    )
    balance: Literal["none", "time"] = Field(
        "none", description="time = slower nodes take fewer than tau local steps, so that all finish together."
    )
    weighting: Literal["tokens", "uniform"] = Field("tokens", description="Weight of an update in the merge.")
    outer: Literal["fedavg", "momentum", "nesterov", "adam", "yogi", "none"] = Field(
        "fedavg",
        description="Outer optimizer on the merged pseudo-gradient; none = the centralised baseline: one pooled node.",
    )
    outer_lr: Rate = Field(1.0, description="Outer learning rate (fedavg with 1.0 is plain averaging).")
    outer_momentum: Decay = Field(0.9, description="momentum, nesterov.")
    outer_betas: tuple[Decay, Decay] = Field((0.9, 0.99), description="adam, yogi.")
    outer_eps: float = Field(1e-8, ge=1e-30, description="adam, yogi.")
    parts: list[str] = Field(
        [],
        description="What is added to FedAvg, in this order, such as share(second=6); the baseline goes without.",
    )
    quorum: float = Field(1.0, gt=0, le=1, description="Share of K that must answer with something usable.")
    grace_s: float = Field(30.0, ge=0, description="After the quorum is met, wait this long for the others.")
    deadline_s: float = Field(6 * 3600.0, gt=0, description="A node's time to answer a task.")
    assemble_s: float = Field(
        120.0, ge=0, description="A round first waits this long for nodes that are not connected."
    )
    norm_bound: bool = Field(True, description="Refuse an update far longer than those of the last rounds.")
    suspend_after: int = Field(3, ge=0, description="Refused replies after which a node is no longer asked; 0 = never.")

    @field_validator("parts", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @property
    def sequential_steps(self) -> int:
        """Steps after which a run is over. With a tau that varies the number of rounds varies, not this."""
        return self.rounds * self.tau


class LinkConfig(Section):
    """How tasks and updates travel, and what an update becomes on the wire."""

    fabric: Literal["local", "flower"] = Field(
        "local", description="local = worker processes here; flower = nodes as processes of their own, anywhere."
    )
    store: str = Field(
        "",
        description="flower: where model bytes wait; empty = beside the gateway, or file:///PATH, s3://, gs://, az://.",
    )
    preset: Literal["exact", "balanced", "tiny"] | None = Field(
        None, description='Codecs by intent, also written `link = "tiny"`: sets the options below unless given.'
    )
    up: list[str] = Field(
        [], description="Stages of updates to the Aggregator, in order, such as int4(block=64); none = exact."
    )
    down: list[str] = Field([], description="Stages of models to the nodes; none = exact.")
    of: Literal["difference", "weights"] = Field(
        "difference",
        description="What lossy stages are given: what changed since the base, or the weights themselves (FedDLR).",
    )
    exact_tensors: list[str] = Field(
        [], description="Patterns such as embed_* of tensors that lossy stages leave alone."
    )
    up_feedback: Fraction | Literal["rescale"] = Field(
        1.0,
        description="Share of what lossy stages left out of an update that is added to the node's next one; rescale = "
        "none, but updates are made longer beforehand, by what stages take of their length.",
    )
    down_feedback: Fraction = Field(1.0, description="As up_feedback, for the model on its way to the nodes.")
    max_update_norm: float | None = Field(None, gt=0, description="A node scales its update down to this L2 norm.")

    @property
    def up_decay(self) -> float:
        """The share of what was left out that a node's next update gets."""
        return 0.0 if self.up_feedback == "rescale" else self.up_feedback

    @property
    def up_rescales(self) -> bool:
        """Whether updates are made longer instead."""
        return self.up_feedback == "rescale"

    @field_validator("up", "down", "exact_tensors", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value


class EvaluationConfig(Section):
    """Held-out loss of the global model, computed by each owner on its own held-out documents."""

    every: Positive = Field(1, description="Rounds between evaluations (the first and last always happen).")
    sequences: Positive = Field(64, description="Held-out sequences of each source of a silo, evenly spaced.")
    batch_size: Positive = Field(8, description="Sequences per forward pass.")
    prompt: str = Field("def ", description="Prompt of the text sample before and after training.")
    sample_tokens: int = Field(96, ge=0, description="Tokens of that sample; 0 = none.")


class CheckpointConfig(Section):
    """Which committed rounds stay on disk, at the Aggregator and at each node."""

    keep_last: int = Field(2, ge=1, description="Newest rounds kept.")
    keep_every: int = Field(0, ge=0, description="Also keep each m-th round; 0 = none.")


class TrackConfig(Section):
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = Field(False, description="Write TensorBoard events under RUN/tensorboard.")
    wandb: str = Field("", description="Weights & Biases project; empty = off.")
    mlflow: str = Field("", description="MLflow tracking server (a URI); empty = off.")


class SiloConfig(Section):
    """One owner: its text, and what differs on its hardware. `name` is the node's identity."""

    name: Name = Field(description="Owner = node = silo.")
    text: list[str] = Field(
        [],
        description="Sources: globs or folders, `hf:dataset[/config][:split]`, `builtin:area`; none if far away.",
    )
    weights: list[float] | None = Field(None, description="Sampling weight of each source; default by size.")
    field: str = Field("text", description="Field that holds the text in .jsonl and .parquet files.")
    batch_size: Positive | None = Field(None, description="Overrides node.batch_size.")
    tau: Positive | None = Field(None, description="Overrides federation.tau.")
    device: Device | None = Field(None, description="Overrides node.device.")

    @field_validator("text", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("weights", mode="before")
    @classmethod
    def _numbers(cls, value: object) -> object:
        return [float(v) if type(v) is int else v for v in value] if isinstance(value, list) else value

    @model_validator(mode="after")
    def _weights_match(self) -> Self:
        if self.weights is not None:
            if len(self.weights) != len(self.text):
                raise ValueError(f"silo {self.name}: {len(self.weights)} weights for {len(self.text)} sources")
            if any(w < 0 for w in self.weights) or not sum(self.weights) > 0:
                raise ValueError(f"silo {self.name}: weights must be >= 0 and not all zero")
        return self


class Recipe(Section):
    """One run, completely described."""

    name: Name = Field("run", description="Name of the recipe; run folders begin with it.")
    about: str = Field("", description="One sentence for people.")
    seed: int = Field(1337, ge=0, lt=2**63, description="Every random choice follows from it.")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    node: NodeConfig = NodeConfig()
    federation: FederationConfig = FederationConfig()
    link: LinkConfig = LinkConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    track: TrackConfig = TrackConfig()
    silo: list[SiloConfig] = Field(min_length=1, description="The owners.")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        names = [s.name for s in self.silo]
        if len({n.lower() for n in names}) != len(names):
            raise ValueError(f"silo names must differ (also in more than case): {', '.join(names)}")
        k = self.federation.nodes_per_round
        if k is not None and k > len(names):
            raise ValueError(f"federation.nodes_per_round = {k} but there are {len(names)} silos")
        if self.node.warmup_steps > self.total_steps:
            raise ValueError(
                f"node.warmup_steps = {self.node.warmup_steps} is longer than the schedule of {self.total_steps} steps"
            )
        return self

    @model_validator(mode="after")
    def _pool_is_here(self) -> Self:
        if self.data.partition == "owner":
            return self
        what = 'data.partition = "iid" deals all silos\' text among the nodes'
        if self.link.fabric != "local":
            raise ValueError(
                f'{what}, so it must all be on one machine: use link.fabric = "local" (photon train), or partition = '
                '"owner", where text stays with its owner'
            )
        for silo in self.silo:
            if not silo.text:
                raise ValueError(f"{what}, and silo {silo.name} has no text here: name it, or leave the silo out")
            if silo.weights is not None:
                raise ValueError(f"{what}, each of which has one source then: leave out weights of silo {silo.name}")
        return self

    @property
    def nodes_per_round(self) -> int:
        """K, the nodes sampled each round."""
        return self.federation.nodes_per_round or len(self.silo)

    @property
    def total_steps(self) -> int:
        """Length of the learning-rate schedule in sequential steps."""
        return self.node.total_steps or self.federation.sequential_steps

    def batch_size_of(self, silo: SiloConfig) -> int:
        """Sequences per local step at this owner."""
        return silo.batch_size or self.node.batch_size

    def tau_of(self, silo: SiloConfig) -> int:
        """Local steps per round at this owner."""
        return silo.tau or self.federation.tau


_FLOATS: tuple[object, ...] = (float, float | None)
_PAIRS: tuple[object, ...] = (tuple[Decay, Decay],)
