from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ChunkStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CHUNK_OK: _ClassVar[ChunkStatus]
    CHUNK_CHECKSUM: _ClassVar[ChunkStatus]
    CHUNK_TORN: _ClassVar[ChunkStatus]
CHUNK_OK: ChunkStatus
CHUNK_CHECKSUM: ChunkStatus
CHUNK_TORN: ChunkStatus

class TransferKey(_message.Message):
    __slots__ = ("transfer_id", "attempt")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    attempt: int
    def __init__(self, transfer_id: _Optional[bytes] = ..., attempt: _Optional[int] = ...) -> None: ...

class KvMsg(_message.Message):
    __slots__ = ("src_epoch", "pair_epoch", "seq", "hello", "hello_ack", "expect", "ready", "ack", "finished", "final_ack", "abort", "abort_ack", "heartbeat")
    SRC_EPOCH_FIELD_NUMBER: _ClassVar[int]
    PAIR_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HELLO_ACK_FIELD_NUMBER: _ClassVar[int]
    EXPECT_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    FINAL_ACK_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    ABORT_ACK_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    src_epoch: int
    pair_epoch: int
    seq: int
    hello: Hello
    hello_ack: HelloAck
    expect: Expect
    ready: ChunkReady
    ack: ChunkAck
    finished: PrefillFinished
    final_ack: FinalAck
    abort: Abort
    abort_ack: AbortAck
    heartbeat: Heartbeat
    def __init__(self, src_epoch: _Optional[int] = ..., pair_epoch: _Optional[int] = ..., seq: _Optional[int] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., hello_ack: _Optional[_Union[HelloAck, _Mapping]] = ..., expect: _Optional[_Union[Expect, _Mapping]] = ..., ready: _Optional[_Union[ChunkReady, _Mapping]] = ..., ack: _Optional[_Union[ChunkAck, _Mapping]] = ..., finished: _Optional[_Union[PrefillFinished, _Mapping]] = ..., final_ack: _Optional[_Union[FinalAck, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., abort_ack: _Optional[_Union[AbortAck, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ...) -> None: ...

class Geometry(_message.Message):
    __slots__ = ("layers", "kv_heads", "head_dim", "block_tokens", "dtype")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: str
    def __init__(self, layers: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., block_tokens: _Optional[int] = ..., dtype: _Optional[str] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("engine_id", "engine_epoch", "peer_epoch", "compat_sha256", "compat_text", "geometry", "transports")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    PEER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    COMPAT_SHA256_FIELD_NUMBER: _ClassVar[int]
    COMPAT_TEXT_FIELD_NUMBER: _ClassVar[int]
    GEOMETRY_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    engine_epoch: int
    peer_epoch: int
    compat_sha256: bytes
    compat_text: str
    geometry: Geometry
    transports: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, engine_id: _Optional[str] = ..., engine_epoch: _Optional[int] = ..., peer_epoch: _Optional[int] = ..., compat_sha256: _Optional[bytes] = ..., compat_text: _Optional[str] = ..., geometry: _Optional[_Union[Geometry, _Mapping]] = ..., transports: _Optional[_Iterable[str]] = ...) -> None: ...

class HelloAck(_message.Message):
    __slots__ = ("engine_id", "engine_epoch", "transport", "blob", "slots", "slot_bytes", "refusal", "probe_capability")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    PROBE_CAPABILITY_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    engine_epoch: int
    transport: str
    blob: bytes
    slots: int
    slot_bytes: int
    refusal: str
    probe_capability: bytes
    def __init__(self, engine_id: _Optional[str] = ..., engine_epoch: _Optional[int] = ..., transport: _Optional[str] = ..., blob: _Optional[bytes] = ..., slots: _Optional[int] = ..., slot_bytes: _Optional[int] = ..., refusal: _Optional[str] = ..., probe_capability: _Optional[bytes] = ...) -> None: ...

class Expect(_message.Message):
    __slots__ = ("key", "have_tokens")
    KEY_FIELD_NUMBER: _ClassVar[int]
    HAVE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    key: TransferKey
    have_tokens: int
    def __init__(self, key: _Optional[_Union[TransferKey, _Mapping]] = ..., have_tokens: _Optional[int] = ...) -> None: ...

class ChunkReady(_message.Message):
    __slots__ = ("key", "chunk", "tok_from", "tok_to", "slot", "slot_gen", "size_bytes", "checksum", "capability")
    KEY_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    TOK_FROM_FIELD_NUMBER: _ClassVar[int]
    TOK_TO_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    SLOT_GEN_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    CAPABILITY_FIELD_NUMBER: _ClassVar[int]
    key: TransferKey
    chunk: int
    tok_from: int
    tok_to: int
    slot: int
    slot_gen: int
    size_bytes: int
    checksum: int
    capability: bytes
    def __init__(self, key: _Optional[_Union[TransferKey, _Mapping]] = ..., chunk: _Optional[int] = ..., tok_from: _Optional[int] = ..., tok_to: _Optional[int] = ..., slot: _Optional[int] = ..., slot_gen: _Optional[int] = ..., size_bytes: _Optional[int] = ..., checksum: _Optional[int] = ..., capability: _Optional[bytes] = ...) -> None: ...

class ChunkAck(_message.Message):
    __slots__ = ("key", "chunk", "slot", "slot_gen", "status")
    KEY_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    SLOT_GEN_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    key: TransferKey
    chunk: int
    slot: int
    slot_gen: int
    status: ChunkStatus
    def __init__(self, key: _Optional[_Union[TransferKey, _Mapping]] = ..., chunk: _Optional[int] = ..., slot: _Optional[int] = ..., slot_gen: _Optional[int] = ..., status: _Optional[_Union[ChunkStatus, str]] = ...) -> None: ...

class PrefillFinished(_message.Message):
    __slots__ = ("key", "total_chunks", "prompt_tokens", "first_token", "final")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TOTAL_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    key: TransferKey
    total_chunks: int
    prompt_tokens: int
    first_token: int
    final: bool
    def __init__(self, key: _Optional[_Union[TransferKey, _Mapping]] = ..., total_chunks: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., first_token: _Optional[int] = ..., final: bool = ...) -> None: ...

class FinalAck(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: TransferKey
    def __init__(self, key: _Optional[_Union[TransferKey, _Mapping]] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("key", "code", "message")
    KEY_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    key: TransferKey
    code: str
    message: str
    def __init__(self, key: _Optional[_Union[TransferKey, _Mapping]] = ..., code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class AbortAck(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: TransferKey
    def __init__(self, key: _Optional[_Union[TransferKey, _Mapping]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("alive",)
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    alive: _containers.RepeatedCompositeFieldContainer[TransferKey]
    def __init__(self, alive: _Optional[_Iterable[_Union[TransferKey, _Mapping]]] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("key", "slot", "slot_gen", "engine_epoch", "capability")
    KEY_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    SLOT_GEN_FIELD_NUMBER: _ClassVar[int]
    ENGINE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    CAPABILITY_FIELD_NUMBER: _ClassVar[int]
    key: TransferKey
    slot: int
    slot_gen: int
    engine_epoch: int
    capability: bytes
    def __init__(self, key: _Optional[_Union[TransferKey, _Mapping]] = ..., slot: _Optional[int] = ..., slot_gen: _Optional[int] = ..., engine_epoch: _Optional[int] = ..., capability: _Optional[bytes] = ...) -> None: ...

class KvBytes(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...
