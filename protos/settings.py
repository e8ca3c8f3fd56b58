"""Settings that cross floors: each class is the one place of its defaults. `diptych.yaml` embeds them unchanged."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

Bytes = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]
Device = Literal["cpu", "cuda"]

# What null means, by device: a card computes 8,192 tokens of an 8B model in 0.2 s, a CPU 512 of a small one.
STEP_TOKENS: Final[dict[Device, int]] = {"cpu": 512, "cuda": 8192}
MAX_RUNNING: Final[dict[Device, int]] = {"cpu": 64, "cuda": 512}
CPU_KV_MIB: Final = 512
EMBED_STEP_TOKENS: Final[dict[Device, int]] = {"cpu": 2048, "cuda": 32_768}


class Settings(BaseModel):
    """Frozen; an unknown key is an error. What was given is not in the text of a failed validation: it may be a key."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, data: Any) -> Any:
        """pydantic would take true for 1."""
        for name, field in cls.model_fields.items():
            if isinstance(data, dict) and isinstance(data.get(name), bool):
                kinds = {field.annotation, *get_args(field.annotation)}
                if bool not in kinds and kinds & {int, float}:
                    raise ValueError(f"{name} should be a number, not {str(data[name]).lower()}")
        return data


class KvSettings(Settings):
    """The KV arena of an engine."""

    block_tokens: int = Field(16, ge=1, le=256, description="tokens per block")
    memory_mib: int | None = Field(
        None, ge=1, description="size of the arena; null: 512 on a CPU, on a card all that the model's steps leave"
    )
    prefix_cache: bool = Field(True, description="reuse blocks of equal prefixes")


class EchoSettings(Settings):
    """The built-in model `echo`: the shape of its KV and how slow it is."""

    layers: int = Field(2, ge=1, le=256, description="layers of KV")
    kv_heads: int = Field(2, ge=1, le=256, description="KV heads of a layer")
    head_dim: int = Field(8, ge=4, le=1024, multiple_of=4, description="numbers of a head; a multiple of 4")
    step_s: float = Field(0.0, ge=0, le=3600, description="time that a step takes, beside its tokens'")
    token_s: float = Field(0.0, ge=0, le=3600, description="time that a token of a step takes, prompts' included")


class PrefillPoolSettings(Settings):
    """The prefill pool of a model."""

    engines: int = Field(1, ge=1, description="engines in the pool")
    step_tokens: int | None = Field(
        None, ge=1, description="prompt tokens computed per step, over all requests; null: 512 on a CPU, 8192 on a card"
    )
    max_running: int = Field(16, ge=1, description="requests in computation or with KV on its way at once")
    max_waiting: int = Field(256, ge=0, description="requests waiting; one more is refused")
    threads: int = Field(0, ge=0, description="CPU threads of an engine; 0: the cores divided by the engines")
    kv: KvSettings | None = Field(None, description="this pool's KV arena; null: the model's kv")

    def on(self, device: Device) -> PrefillSettings:
        """With the sizes that null stands for there."""
        return PrefillSettings.model_validate({"step_tokens": STEP_TOKENS[device], **_given(self)})


class PrefillSettings(PrefillPoolSettings):
    """What a prefill engine computes with: its pool's settings on its device."""

    step_tokens: int = Field(STEP_TOKENS["cpu"], ge=1)


class DecodePoolSettings(Settings):
    """The decode pool of a model."""

    engines: int = Field(1, ge=1, description="engines in the pool")
    max_running: int | None = Field(None, ge=1, description="sequences in one step; null: 64 on a CPU, 512 on a card")
    step_tokens: int | None = Field(
        None, ge=1, description="tokens per step, prompts computed here included; null: 512 on a CPU, 8192 on a card"
    )
    pace: Literal["latency", "throughput"] = Field(
        "latency",
        description="on a card, prompts computed beside running answers; latency: as many tokens as itl_target_s lets, "
        "throughput: full steps",
    )
    itl_target_s: Seconds = Field(
        0.02, description="pace latency: seconds of a step with running answers, as long as prompts can be served so"
    )
    itl_limit_s: Seconds = Field(
        0.05,
        validate_default=True,
        description="pace latency: the same where prompts would wait too long; a backlog of seconds alone goes beyond",
    )
    max_waiting: int = Field(256, ge=0, description="requests waiting, those whose KV is on its way included")
    threads: int = Field(0, ge=0, description="CPU threads of an engine; 0: the cores divided by the engines")
    kv: KvSettings | None = Field(None, description="this pool's KV arena; null: the model's kv")
    watermark: float = Field(0.01, ge=0, lt=1, description="part of the blocks that new sequences leave free")

    @field_validator("itl_limit_s")
    @classmethod
    def _beyond_target(cls, limit: float, info: ValidationInfo) -> float:
        target = info.data.get("itl_target_s", limit)
        if limit < target:
            raise ValueError(
                f"{limit:g} is less than itl_target_s, which is {target:g}; raise the one or lower the other"
            )
        return limit

    def on(self, device: Device) -> DecodeSettings:
        """With the sizes that null stands for there."""
        sizes = {"step_tokens": STEP_TOKENS[device], "max_running": MAX_RUNNING[device]}
        return DecodeSettings.model_validate({**sizes, **_given(self)})


class DecodeSettings(DecodePoolSettings):
    """What a decode engine computes with: its pool's settings on its device."""

    max_running: int = Field(MAX_RUNNING["cpu"], ge=1)
    step_tokens: int = Field(STEP_TOKENS["cpu"], ge=1)


class EmbedPoolSettings(Settings):
    """The pool of a model that embeds or ranks texts, and what it makes of them where its folder does not say."""

    engines: int = Field(1, ge=1, description="engines in the pool")
    step_tokens: int | None = Field(
        None, ge=1, description="tokens computed per step, over all requests; null: 2048 on a CPU, 32768 on a card"
    )
    max_waiting: int = Field(
        256, ge=0, description="requests of an engine that are not computed yet; one more is refused"
    )
    threads: int = Field(0, ge=0, description="CPU threads of an engine; 0: the cores divided by the engines")
    pooling: Literal["auto", "mean", "cls", "last"] = Field(
        "auto",
        description="from the vectors of tokens to one of the text; auto: as the folder's sentence-transformers files "
        "say, else last for decoders and mean for encoders",
    )
    normalize: bool | None = Field(
        None, description="vectors of length 1; null: as those files say, true where there are none"
    )
    max_tokens: int | None = Field(
        None,
        ge=2,
        description="longest text in tokens; null: as those files say, else as many as the model can read",
    )
    truncate: Literal["none", "start", "end"] = Field(
        "none", description="a longer text, where the request does not say: refused, or cut at its start or end"
    )

    def tokens_on(self, device: Device) -> int:
        """Of a step."""
        return self.step_tokens or EMBED_STEP_TOKENS[device]


def _given(settings: Settings) -> dict[str, Any]:
    """What is not null, unchanged."""
    return {name: value for name, value in settings if value is not None}


class TransferSettings(Settings):
    """The hinge between the two pools."""

    transport: Literal["auto", "shm", "grpc"] = Field("auto", description="auto: shm on one host, else grpc")
    slot_kib: int = Field(4096, ge=64, description="size of a staging slot")
    slots: int = Field(16, ge=2, description="staging slots of a prefill engine")
    pair_min_slots: int = Field(2, ge=1, description="slots that every decode engine is sure of")
    lease_s: Seconds = Field(30.0, description="a prefill engine keeps staged KV this long without a heartbeat")
    heartbeat_s: Seconds = Field(0.5, description="how often a decode engine tells that it lives and renews its leases")
    silence_s: Seconds = Field(
        1.2, description="an engine that says nothing to the other one of a pair this long is gone"
    )
    stall_s: Seconds = Field(10.0, description="no progress for this long ends a transfer")
    abort_ack_s: Seconds = Field(2.0, description="wait for the other side to confirm an abort")
    dial_timeout_s: Seconds = Field(5.0, description="time to reach a prefill engine and agree on a pair")
    fetch_timeout_s: Seconds = Field(2.0, description="time for one slot to come over gRPC")
    min_mib_s: float = Field(50.0, ge=0, description="a transport that tries slower is left where there is another one")
