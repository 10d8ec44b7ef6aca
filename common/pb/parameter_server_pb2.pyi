from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Place(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FRAME: _ClassVar[Place]
    PARAMETERS: _ClassVar[Place]
    ANSWERS: _ClassVar[Place]
FRAME: Place
PARAMETERS: Place
ANSWERS: Place

class TensorSpec(_message.Message):
    __slots__ = ("name", "shape", "dtype", "copied")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    COPIED_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    dtype: str
    copied: bool
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., dtype: _Optional[str] = ..., copied: bool = ...) -> None: ...

class HyperValue(_message.Message):
    __slots__ = ("number", "integer", "flag", "text", "numbers", "none", "type")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    FLAG_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    NONE_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    number: float
    integer: int
    flag: bool
    text: str
    numbers: NumberList
    none: bool
    type: str
    def __init__(self, number: _Optional[float] = ..., integer: _Optional[int] = ..., flag: bool = ..., text: _Optional[str] = ..., numbers: _Optional[_Union[NumberList, _Mapping]] = ..., none: bool = ..., type: _Optional[str] = ...) -> None: ...

class NumberList(_message.Message):
    __slots__ = ("value", "type")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    value: _containers.RepeatedScalarFieldContainer[float]
    type: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, value: _Optional[_Iterable[float]] = ..., type: _Optional[_Iterable[str]] = ...) -> None: ...

class ParameterGroup(_message.Message):
    __slots__ = ("tensor", "hyper")
    class HyperEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: HyperValue
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[HyperValue, _Mapping]] = ...) -> None: ...
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    HYPER_FIELD_NUMBER: _ClassVar[int]
    tensor: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    hyper: _containers.MessageMap[str, HyperValue]
    def __init__(self, tensor: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., hyper: _Optional[_Mapping[str, HyperValue]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("optimizer", "group", "buffer")
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    BUFFER_FIELD_NUMBER: _ClassVar[int]
    optimizer: str
    group: _containers.RepeatedCompositeFieldContainer[ParameterGroup]
    buffer: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    def __init__(self, optimizer: _Optional[str] = ..., group: _Optional[_Iterable[_Union[ParameterGroup, _Mapping]]] = ..., buffer: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ...) -> None: ...

class Version(_message.Message):
    __slots__ = ("package", "wire")
    PACKAGE_FIELD_NUMBER: _ClassVar[int]
    WIRE_FIELD_NUMBER: _ClassVar[int]
    package: str
    wire: int
    def __init__(self, package: _Optional[str] = ..., wire: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("model", "version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    model: bool
    version: Version
    def __init__(self, model: bool = ..., version: _Optional[_Union[Version, _Mapping]] = ...) -> None: ...

class JobDescription(_message.Message):
    __slots__ = ("mode", "shard", "num_shards", "bucket_bytes", "lease_seconds", "quorum", "initialised", "model", "codec", "mode_details", "clip_norm", "socket", "data_port", "resumed_version", "configuration", "closed", "options", "incarnation", "trace", "version", "averages")
    MODE_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    NUM_SHARDS_FIELD_NUMBER: _ClassVar[int]
    BUCKET_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    QUORUM_FIELD_NUMBER: _ClassVar[int]
    INITIALISED_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    MODE_DETAILS_FIELD_NUMBER: _ClassVar[int]
    CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    SOCKET_FIELD_NUMBER: _ClassVar[int]
    DATA_PORT_FIELD_NUMBER: _ClassVar[int]
    RESUMED_VERSION_FIELD_NUMBER: _ClassVar[int]
    CONFIGURATION_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    AVERAGES_FIELD_NUMBER: _ClassVar[int]
    mode: str
    shard: int
    num_shards: int
    bucket_bytes: int
    lease_seconds: float
    quorum: int
    initialised: bool
    model: Model
    codec: _containers.RepeatedScalarFieldContainer[str]
    mode_details: str
    clip_norm: float
    socket: SocketOffer
    data_port: DataPortOffer
    resumed_version: int
    configuration: Configuration
    closed: str
    options: str
    incarnation: int
    trace: TraceSteps
    version: Version
    averages: bool
    def __init__(self, mode: _Optional[str] = ..., shard: _Optional[int] = ..., num_shards: _Optional[int] = ..., bucket_bytes: _Optional[int] = ..., lease_seconds: _Optional[float] = ..., quorum: _Optional[int] = ..., initialised: bool = ..., model: _Optional[_Union[Model, _Mapping]] = ..., codec: _Optional[_Iterable[str]] = ..., mode_details: _Optional[str] = ..., clip_norm: _Optional[float] = ..., socket: _Optional[_Union[SocketOffer, _Mapping]] = ..., data_port: _Optional[_Union[DataPortOffer, _Mapping]] = ..., resumed_version: _Optional[int] = ..., configuration: _Optional[_Union[Configuration, _Mapping]] = ..., closed: _Optional[str] = ..., options: _Optional[str] = ..., incarnation: _Optional[int] = ..., trace: _Optional[_Union[TraceSteps, _Mapping]] = ..., version: _Optional[_Union[Version, _Mapping]] = ..., averages: bool = ...) -> None: ...

class EnterRequest(_message.Message):
    __slots__ = ("shard", "num_shards", "version", "secret")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    NUM_SHARDS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    shard: int
    num_shards: int
    version: Version
    secret: bytes
    def __init__(self, shard: _Optional[int] = ..., num_shards: _Optional[int] = ..., version: _Optional[_Union[Version, _Mapping]] = ..., secret: _Optional[bytes] = ...) -> None: ...

class EnterReply(_message.Message):
    __slots__ = ("incarnation", "resumed_version", "version", "trace")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    RESUMED_VERSION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    resumed_version: int
    version: Version
    trace: TraceSteps
    def __init__(self, incarnation: _Optional[int] = ..., resumed_version: _Optional[int] = ..., version: _Optional[_Union[Version, _Mapping]] = ..., trace: _Optional[_Union[TraceSteps, _Mapping]] = ...) -> None: ...

class SocketOffer(_message.Message):
    __slots__ = ("host", "name", "token", "port")
    HOST_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    host: str
    name: str
    token: bytes
    port: int
    def __init__(self, host: _Optional[str] = ..., name: _Optional[str] = ..., token: _Optional[bytes] = ..., port: _Optional[int] = ...) -> None: ...

class DataPortOffer(_message.Message):
    __slots__ = ("port", "token", "server_port", "tls")
    PORT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    SERVER_PORT_FIELD_NUMBER: _ClassVar[int]
    TLS_FIELD_NUMBER: _ClassVar[int]
    port: int
    token: bytes
    server_port: int
    tls: bool
    def __init__(self, port: _Optional[int] = ..., token: _Optional[bytes] = ..., server_port: _Optional[int] = ..., tls: bool = ...) -> None: ...

class StreamEnd(_message.Message):
    __slots__ = ("error", "text")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    error: str
    text: str
    def __init__(self, error: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("worker", "rank", "model", "version", "incarnation", "secret")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    worker: str
    rank: int
    model: Model
    version: Version
    incarnation: int
    secret: bytes
    def __init__(self, worker: _Optional[str] = ..., rank: _Optional[int] = ..., model: _Optional[_Union[Model, _Mapping]] = ..., version: _Optional[_Union[Version, _Mapping]] = ..., incarnation: _Optional[int] = ..., secret: _Optional[bytes] = ...) -> None: ...

class JoinReply(_message.Message):
    __slots__ = ("session", "seed", "epoch")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    session: int
    seed: bool
    epoch: int
    def __init__(self, session: _Optional[int] = ..., seed: bool = ..., epoch: _Optional[int] = ...) -> None: ...

class SeedFrame(_message.Message):
    __slots__ = ("header", "payload")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    header: SeedHeader
    payload: bytes
    def __init__(self, header: _Optional[_Union[SeedHeader, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class SeedHeader(_message.Message):
    __slots__ = ("worker", "session", "model", "incarnation", "secret", "bucket")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    worker: str
    session: int
    model: Model
    incarnation: int
    secret: bytes
    bucket: int
    def __init__(self, worker: _Optional[str] = ..., session: _Optional[int] = ..., model: _Optional[_Union[Model, _Mapping]] = ..., incarnation: _Optional[int] = ..., secret: _Optional[bytes] = ..., bucket: _Optional[int] = ...) -> None: ...

class SeedReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ArenaOffer(_message.Message):
    __slots__ = ("host", "pid", "fd", "token", "size")
    HOST_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    FD_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    host: str
    pid: int
    fd: int
    token: bytes
    size: int
    def __init__(self, host: _Optional[str] = ..., pid: _Optional[int] = ..., fd: _Optional[int] = ..., token: _Optional[bytes] = ..., size: _Optional[int] = ...) -> None: ...

class ShareRequest(_message.Message):
    __slots__ = ("worker", "session", "gradients", "answers", "dialled_port", "secret")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    DIALLED_PORT_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    worker: str
    session: int
    gradients: ArenaOffer
    answers: ArenaOffer
    dialled_port: int
    secret: bytes
    def __init__(self, worker: _Optional[str] = ..., session: _Optional[int] = ..., gradients: _Optional[_Union[ArenaOffer, _Mapping]] = ..., answers: _Optional[_Union[ArenaOffer, _Mapping]] = ..., dialled_port: _Optional[int] = ..., secret: _Optional[bytes] = ...) -> None: ...

class ShareReply(_message.Message):
    __slots__ = ("parameters", "reason")
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    parameters: ArenaOffer
    reason: str
    def __init__(self, parameters: _Optional[_Union[ArenaOffer, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("worker", "session", "incarnation", "secret")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    worker: str
    session: int
    incarnation: int
    secret: bytes
    def __init__(self, worker: _Optional[str] = ..., session: _Optional[int] = ..., incarnation: _Optional[int] = ..., secret: _Optional[bytes] = ...) -> None: ...

class RenewReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("worker", "session", "secret")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    worker: str
    session: int
    secret: bytes
    def __init__(self, worker: _Optional[str] = ..., session: _Optional[int] = ..., secret: _Optional[bytes] = ...) -> None: ...

class LeaveReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DataSet(_message.Message):
    __slots__ = ("name", "size", "seed", "shuffled")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SHUFFLED_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    seed: int
    shuffled: bool
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ..., seed: _Optional[int] = ..., shuffled: bool = ...) -> None: ...

class DataRequest(_message.Message):
    __slots__ = ("worker", "session", "data", "batch", "epochs", "wait", "give_back", "received", "together", "number", "secret")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    GIVE_BACK_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    TOGETHER_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    worker: str
    session: int
    data: DataSet
    batch: int
    epochs: int
    wait: bool
    give_back: bool
    received: int
    together: bool
    number: int
    secret: bytes
    def __init__(self, worker: _Optional[str] = ..., session: _Optional[int] = ..., data: _Optional[_Union[DataSet, _Mapping]] = ..., batch: _Optional[int] = ..., epochs: _Optional[int] = ..., wait: bool = ..., give_back: bool = ..., received: _Optional[int] = ..., together: bool = ..., number: _Optional[int] = ..., secret: _Optional[bytes] = ...) -> None: ...

class PositionRange(_message.Message):
    __slots__ = ("start", "stop")
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    start: int
    stop: int
    def __init__(self, start: _Optional[int] = ..., stop: _Optional[int] = ...) -> None: ...

class DataReply(_message.Message):
    __slots__ = ("answer", "number", "epoch", "range")
    class Answer(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        LATER: _ClassVar[DataReply.Answer]
        PORTION: _ClassVar[DataReply.Answer]
        IDLE: _ClassVar[DataReply.Answer]
        OVER: _ClassVar[DataReply.Answer]
    LATER: DataReply.Answer
    PORTION: DataReply.Answer
    IDLE: DataReply.Answer
    OVER: DataReply.Answer
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RANGE_FIELD_NUMBER: _ClassVar[int]
    answer: DataReply.Answer
    number: int
    epoch: int
    range: _containers.RepeatedCompositeFieldContainer[PositionRange]
    def __init__(self, answer: _Optional[_Union[DataReply.Answer, str]] = ..., number: _Optional[int] = ..., epoch: _Optional[int] = ..., range: _Optional[_Iterable[_Union[PositionRange, _Mapping]]] = ...) -> None: ...

class Covers(_message.Message):
    __slots__ = ("number", "samples")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    number: int
    samples: int
    def __init__(self, number: _Optional[int] = ..., samples: _Optional[int] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("incarnation", "shard", "secret")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    shard: int
    secret: bytes
    def __init__(self, incarnation: _Optional[int] = ..., shard: _Optional[int] = ..., secret: _Optional[bytes] = ...) -> None: ...

class RosterView(_message.Message):
    __slots__ = ("epoch", "open", "member", "lead", "cut", "stopped")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    LEAD_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    STOPPED_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    open: bool
    member: _containers.RepeatedCompositeFieldContainer[RosterMember]
    lead: _containers.RepeatedScalarFieldContainer[str]
    cut: int
    stopped: str
    def __init__(self, epoch: _Optional[int] = ..., open: bool = ..., member: _Optional[_Iterable[_Union[RosterMember, _Mapping]]] = ..., lead: _Optional[_Iterable[str]] = ..., cut: _Optional[int] = ..., stopped: _Optional[str] = ...) -> None: ...

class RosterMember(_message.Message):
    __slots__ = ("worker", "session", "rank", "first_step", "digest", "seeds")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    worker: str
    session: int
    rank: int
    first_step: int
    digest: str
    seeds: str
    def __init__(self, worker: _Optional[str] = ..., session: _Optional[int] = ..., rank: _Optional[int] = ..., first_step: _Optional[int] = ..., digest: _Optional[str] = ..., seeds: _Optional[str] = ...) -> None: ...

class UpFrame(_message.Message):
    __slots__ = ("header", "payload")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    header: _containers.RepeatedCompositeFieldContainer[UpHeader]
    payload: bytes
    def __init__(self, header: _Optional[_Iterable[_Union[UpHeader, _Mapping]]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class UpHeader(_message.Message):
    __slots__ = ("hello", "push", "pull", "renew", "ahead", "ballot", "measure")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PUSH_FIELD_NUMBER: _ClassVar[int]
    PULL_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    AHEAD_FIELD_NUMBER: _ClassVar[int]
    BALLOT_FIELD_NUMBER: _ClassVar[int]
    MEASURE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    push: Push
    pull: Pull
    renew: Renew
    ahead: Ahead
    ballot: BallotPaper
    measure: Measure
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., push: _Optional[_Union[Push, _Mapping]] = ..., pull: _Optional[_Union[Pull, _Mapping]] = ..., renew: _Optional[_Union[Renew, _Mapping]] = ..., ahead: _Optional[_Union[Ahead, _Mapping]] = ..., ballot: _Optional[_Union[BallotPaper, _Mapping]] = ..., measure: _Optional[_Union[Measure, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("worker", "session", "pull_codec", "version", "incarnation", "secret")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    PULL_CODEC_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    worker: str
    session: int
    pull_codec: str
    version: Version
    incarnation: int
    secret: bytes
    def __init__(self, worker: _Optional[str] = ..., session: _Optional[int] = ..., pull_codec: _Optional[str] = ..., version: _Optional[_Union[Version, _Mapping]] = ..., incarnation: _Optional[int] = ..., secret: _Optional[bytes] = ...) -> None: ...

class Ahead(_message.Message):
    __slots__ = ("bucket", "number", "codec")
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    bucket: int
    number: int
    codec: str
    def __init__(self, bucket: _Optional[int] = ..., number: _Optional[int] = ..., codec: _Optional[str] = ...) -> None: ...

class Push(_message.Message):
    __slots__ = ("step", "bucket", "base", "weight", "codec", "epoch", "hyper", "missing", "ahead", "absent", "written", "arena_bytes", "covers", "nonfinite")
    class HyperEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: HyperValue
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[HyperValue, _Mapping]] = ...) -> None: ...
    STEP_FIELD_NUMBER: _ClassVar[int]
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    HYPER_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    AHEAD_FIELD_NUMBER: _ClassVar[int]
    ABSENT_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_FIELD_NUMBER: _ClassVar[int]
    ARENA_BYTES_FIELD_NUMBER: _ClassVar[int]
    COVERS_FIELD_NUMBER: _ClassVar[int]
    NONFINITE_FIELD_NUMBER: _ClassVar[int]
    step: int
    bucket: int
    base: int
    weight: float
    codec: str
    epoch: int
    hyper: _containers.MessageMap[str, HyperValue]
    missing: bool
    ahead: int
    absent: _containers.RepeatedScalarFieldContainer[int]
    written: _containers.RepeatedScalarFieldContainer[int]
    arena_bytes: int
    covers: _containers.RepeatedCompositeFieldContainer[Covers]
    nonfinite: bool
    def __init__(self, step: _Optional[int] = ..., bucket: _Optional[int] = ..., base: _Optional[int] = ..., weight: _Optional[float] = ..., codec: _Optional[str] = ..., epoch: _Optional[int] = ..., hyper: _Optional[_Mapping[str, HyperValue]] = ..., missing: bool = ..., ahead: _Optional[int] = ..., absent: _Optional[_Iterable[int]] = ..., written: _Optional[_Iterable[int]] = ..., arena_bytes: _Optional[int] = ..., covers: _Optional[_Iterable[_Union[Covers, _Mapping]]] = ..., nonfinite: bool = ...) -> None: ...

class CommitReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Pull(_message.Message):
    __slots__ = ("bucket",)
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    bucket: int
    def __init__(self, bucket: _Optional[int] = ...) -> None: ...

class Measure(_message.Message):
    __slots__ = ("step", "bucket", "round", "power", "weight", "epoch", "arena_bytes", "ahead", "missing")
    STEP_FIELD_NUMBER: _ClassVar[int]
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    POWER_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ARENA_BYTES_FIELD_NUMBER: _ClassVar[int]
    AHEAD_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    step: int
    bucket: int
    round: int
    power: float
    weight: float
    epoch: int
    arena_bytes: int
    ahead: int
    missing: bool
    def __init__(self, step: _Optional[int] = ..., bucket: _Optional[int] = ..., round: _Optional[int] = ..., power: _Optional[float] = ..., weight: _Optional[float] = ..., epoch: _Optional[int] = ..., arena_bytes: _Optional[int] = ..., ahead: _Optional[int] = ..., missing: bool = ...) -> None: ...

class Measured(_message.Message):
    __slots__ = ("step", "round", "norm", "contributor", "without")
    STEP_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    NORM_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTOR_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_FIELD_NUMBER: _ClassVar[int]
    step: int
    round: int
    norm: _containers.RepeatedScalarFieldContainer[float]
    contributor: _containers.RepeatedScalarFieldContainer[str]
    without: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, step: _Optional[int] = ..., round: _Optional[int] = ..., norm: _Optional[_Iterable[float]] = ..., contributor: _Optional[_Iterable[str]] = ..., without: _Optional[_Iterable[str]] = ...) -> None: ...

class Renew(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DownFrame(_message.Message):
    __slots__ = ("header", "payload")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    header: _containers.RepeatedCompositeFieldContainer[DownHeader]
    payload: bytes
    def __init__(self, header: _Optional[_Iterable[_Union[DownHeader, _Mapping]]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class DownHeader(_message.Message):
    __slots__ = ("bucket", "version", "next_step", "ballot", "measured", "step", "staleness", "applied", "samples", "codec", "epoch", "place", "delta", "contributor")
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NEXT_STEP_FIELD_NUMBER: _ClassVar[int]
    BALLOT_FIELD_NUMBER: _ClassVar[int]
    MEASURED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTOR_FIELD_NUMBER: _ClassVar[int]
    bucket: int
    version: int
    next_step: int
    ballot: Ballot
    measured: Measured
    step: int
    staleness: int
    applied: bool
    samples: float
    codec: str
    epoch: int
    place: Place
    delta: bool
    contributor: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, bucket: _Optional[int] = ..., version: _Optional[int] = ..., next_step: _Optional[int] = ..., ballot: _Optional[_Union[Ballot, _Mapping]] = ..., measured: _Optional[_Union[Measured, _Mapping]] = ..., step: _Optional[int] = ..., staleness: _Optional[int] = ..., applied: bool = ..., samples: _Optional[float] = ..., codec: _Optional[str] = ..., epoch: _Optional[int] = ..., place: _Optional[_Union[Place, str]] = ..., delta: bool = ..., contributor: _Optional[_Iterable[str]] = ...) -> None: ...

class NormRequest(_message.Message):
    __slots__ = ("shard", "worker", "session", "step", "square", "incarnation", "secret")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SQUARE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    shard: int
    worker: str
    session: int
    step: int
    square: float
    incarnation: int
    secret: bytes
    def __init__(self, shard: _Optional[int] = ..., worker: _Optional[str] = ..., session: _Optional[int] = ..., step: _Optional[int] = ..., square: _Optional[float] = ..., incarnation: _Optional[int] = ..., secret: _Optional[bytes] = ...) -> None: ...

class NormReply(_message.Message):
    __slots__ = ("dropped", "square")
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    SQUARE_FIELD_NUMBER: _ClassVar[int]
    dropped: bool
    square: float
    def __init__(self, dropped: bool = ..., square: _Optional[float] = ...) -> None: ...

class KeptRequest(_message.Message):
    __slots__ = ("shard", "version", "size", "sha256", "error", "incarnation", "secret")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    shard: int
    version: int
    size: int
    sha256: str
    error: str
    incarnation: int
    secret: bytes
    def __init__(self, shard: _Optional[int] = ..., version: _Optional[int] = ..., size: _Optional[int] = ..., sha256: _Optional[str] = ..., error: _Optional[str] = ..., incarnation: _Optional[int] = ..., secret: _Optional[bytes] = ...) -> None: ...

class KeptReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CheckpointStatus(_message.Message):
    __slots__ = ("version", "age_seconds", "failures", "error", "folder")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    version: int
    age_seconds: float
    failures: int
    error: str
    folder: str
    def __init__(self, version: _Optional[int] = ..., age_seconds: _Optional[float] = ..., failures: _Optional[int] = ..., error: _Optional[str] = ..., folder: _Optional[str] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: Version
    def __init__(self, version: _Optional[_Union[Version, _Mapping]] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("shard", "num_shards", "mode", "initialised", "epoch", "open", "version", "num_buckets", "num_parameters", "uptime_seconds", "worker", "staleness", "late", "nonfinite", "mode_details", "advice", "software", "checkpoint", "standby", "samples", "load", "joins", "more_workers")
    class StalenessEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: int
        def __init__(self, key: _Optional[int] = ..., value: _Optional[int] = ...) -> None: ...
    SHARD_FIELD_NUMBER: _ClassVar[int]
    NUM_SHARDS_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    INITIALISED_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_BUCKETS_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    LATE_FIELD_NUMBER: _ClassVar[int]
    NONFINITE_FIELD_NUMBER: _ClassVar[int]
    MODE_DETAILS_FIELD_NUMBER: _ClassVar[int]
    ADVICE_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    STANDBY_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    JOINS_FIELD_NUMBER: _ClassVar[int]
    MORE_WORKERS_FIELD_NUMBER: _ClassVar[int]
    shard: int
    num_shards: int
    mode: str
    initialised: bool
    epoch: int
    open: bool
    version: int
    num_buckets: int
    num_parameters: int
    uptime_seconds: float
    worker: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    staleness: _containers.ScalarMap[int, int]
    late: int
    nonfinite: int
    mode_details: str
    advice: _containers.RepeatedScalarFieldContainer[str]
    software: Version
    checkpoint: CheckpointStatus
    standby: StandbyStatus
    samples: float
    load: ShardLoad
    joins: int
    more_workers: int
    def __init__(self, shard: _Optional[int] = ..., num_shards: _Optional[int] = ..., mode: _Optional[str] = ..., initialised: bool = ..., epoch: _Optional[int] = ..., open: bool = ..., version: _Optional[int] = ..., num_buckets: _Optional[int] = ..., num_parameters: _Optional[int] = ..., uptime_seconds: _Optional[float] = ..., worker: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., staleness: _Optional[_Mapping[int, int]] = ..., late: _Optional[int] = ..., nonfinite: _Optional[int] = ..., mode_details: _Optional[str] = ..., advice: _Optional[_Iterable[str]] = ..., software: _Optional[_Union[Version, _Mapping]] = ..., checkpoint: _Optional[_Union[CheckpointStatus, _Mapping]] = ..., standby: _Optional[_Union[StandbyStatus, _Mapping]] = ..., samples: _Optional[float] = ..., load: _Optional[_Union[ShardLoad, _Mapping]] = ..., joins: _Optional[int] = ..., more_workers: _Optional[int] = ...) -> None: ...

class ShardLoad(_message.Message):
    __slots__ = ("queued", "apply_threads", "apply_seconds", "cpu_seconds", "memory_bytes", "bytes_pushed", "bytes_pulled")
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    APPLY_THREADS_FIELD_NUMBER: _ClassVar[int]
    APPLY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CPU_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    BYTES_PUSHED_FIELD_NUMBER: _ClassVar[int]
    BYTES_PULLED_FIELD_NUMBER: _ClassVar[int]
    queued: int
    apply_threads: int
    apply_seconds: float
    cpu_seconds: float
    memory_bytes: int
    bytes_pushed: int
    bytes_pulled: int
    def __init__(self, queued: _Optional[int] = ..., apply_threads: _Optional[int] = ..., apply_seconds: _Optional[float] = ..., cpu_seconds: _Optional[float] = ..., memory_bytes: _Optional[int] = ..., bytes_pushed: _Optional[int] = ..., bytes_pulled: _Optional[int] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("worker", "session", "rank", "clock", "connected", "silent_seconds", "waiting_seconds", "reason", "bytes_pushed", "bytes_pulled", "shares_memory", "samples", "staleness", "carrier", "carrier_reason", "waiting_for")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    SILENT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WAITING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    BYTES_PUSHED_FIELD_NUMBER: _ClassVar[int]
    BYTES_PULLED_FIELD_NUMBER: _ClassVar[int]
    SHARES_MEMORY_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    CARRIER_FIELD_NUMBER: _ClassVar[int]
    CARRIER_REASON_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    worker: str
    session: int
    rank: int
    clock: int
    connected: bool
    silent_seconds: float
    waiting_seconds: float
    reason: str
    bytes_pushed: int
    bytes_pulled: int
    shares_memory: bool
    samples: float
    staleness: int
    carrier: str
    carrier_reason: str
    waiting_for: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, worker: _Optional[str] = ..., session: _Optional[int] = ..., rank: _Optional[int] = ..., clock: _Optional[int] = ..., connected: bool = ..., silent_seconds: _Optional[float] = ..., waiting_seconds: _Optional[float] = ..., reason: _Optional[str] = ..., bytes_pushed: _Optional[int] = ..., bytes_pulled: _Optional[int] = ..., shares_memory: bool = ..., samples: _Optional[float] = ..., staleness: _Optional[int] = ..., carrier: _Optional[str] = ..., carrier_reason: _Optional[str] = ..., waiting_for: _Optional[_Iterable[int]] = ...) -> None: ...

class TraceSteps(_message.Message):
    __slots__ = ("first", "stop")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    first: int
    stop: int
    def __init__(self, first: _Optional[int] = ..., stop: _Optional[int] = ...) -> None: ...

class TraceRequest(_message.Message):
    __slots__ = ("worker", "session", "shard", "part", "incarnation", "secret")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    worker: str
    session: int
    shard: int
    part: TracePart
    incarnation: int
    secret: bytes
    def __init__(self, worker: _Optional[str] = ..., session: _Optional[int] = ..., shard: _Optional[int] = ..., part: _Optional[_Union[TracePart, _Mapping]] = ..., incarnation: _Optional[int] = ..., secret: _Optional[bytes] = ...) -> None: ...

class TraceReply(_message.Message):
    __slots__ = ("clock", "now")
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    NOW_FIELD_NUMBER: _ClassVar[int]
    clock: str
    now: int
    def __init__(self, clock: _Optional[str] = ..., now: _Optional[int] = ...) -> None: ...

class TracePart(_message.Message):
    __slots__ = ("host", "pid", "word", "span", "error", "dropped")
    HOST_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    WORD_FIELD_NUMBER: _ClassVar[int]
    SPAN_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    host: str
    pid: int
    word: _containers.RepeatedScalarFieldContainer[str]
    span: _containers.RepeatedCompositeFieldContainer[TraceSpan]
    error: int
    dropped: int
    def __init__(self, host: _Optional[str] = ..., pid: _Optional[int] = ..., word: _Optional[_Iterable[str]] = ..., span: _Optional[_Iterable[_Union[TraceSpan, _Mapping]]] = ..., error: _Optional[int] = ..., dropped: _Optional[int] = ...) -> None: ...

class TraceSpan(_message.Message):
    __slots__ = ("name", "thread", "worker", "step", "bucket", "start", "duration")
    NAME_FIELD_NUMBER: _ClassVar[int]
    THREAD_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    DURATION_FIELD_NUMBER: _ClassVar[int]
    name: int
    thread: int
    worker: int
    step: int
    bucket: int
    start: int
    duration: int
    def __init__(self, name: _Optional[int] = ..., thread: _Optional[int] = ..., worker: _Optional[int] = ..., step: _Optional[int] = ..., bucket: _Optional[int] = ..., start: _Optional[int] = ..., duration: _Optional[int] = ...) -> None: ...

class ReplicaUp(_message.Message):
    __slots__ = ("hello", "received", "failed")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    hello: ReplicaHello
    received: int
    failed: str
    def __init__(self, hello: _Optional[_Union[ReplicaHello, _Mapping]] = ..., received: _Optional[int] = ..., failed: _Optional[str] = ...) -> None: ...

class ReplicaHello(_message.Message):
    __slots__ = ("server", "version")
    SERVER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    server: str
    version: Version
    def __init__(self, server: _Optional[str] = ..., version: _Optional[_Union[Version, _Mapping]] = ...) -> None: ...

class ReplicaFrame(_message.Message):
    __slots__ = ("header", "payload")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    header: ReplicaHeader
    payload: bytes
    def __init__(self, header: _Optional[_Union[ReplicaHeader, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class ReplicaHeader(_message.Message):
    __slots__ = ("model", "tensor", "bucket", "step", "answer", "roster", "data", "norm", "complete", "change")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    NORM_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    model: Model
    tensor: ReplicaTensor
    bucket: ReplicaBucket
    step: ReplicaStep
    answer: ReplicaAnswer
    roster: ReplicaRoster
    data: ReplicaData
    norm: ReplicaNorm
    complete: ReplicaComplete
    change: ReplicaChange
    def __init__(self, model: _Optional[_Union[Model, _Mapping]] = ..., tensor: _Optional[_Union[ReplicaTensor, _Mapping]] = ..., bucket: _Optional[_Union[ReplicaBucket, _Mapping]] = ..., step: _Optional[_Union[ReplicaStep, _Mapping]] = ..., answer: _Optional[_Union[ReplicaAnswer, _Mapping]] = ..., roster: _Optional[_Union[ReplicaRoster, _Mapping]] = ..., data: _Optional[_Union[ReplicaData, _Mapping]] = ..., norm: _Optional[_Union[ReplicaNorm, _Mapping]] = ..., complete: _Optional[_Union[ReplicaComplete, _Mapping]] = ..., change: _Optional[_Union[ReplicaChange, _Mapping]] = ...) -> None: ...

class ReplicaTensor(_message.Message):
    __slots__ = ("bucket", "name", "scalar")
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SCALAR_FIELD_NUMBER: _ClassVar[int]
    bucket: int
    name: str
    scalar: bool
    def __init__(self, bucket: _Optional[int] = ..., name: _Optional[str] = ..., scalar: bool = ...) -> None: ...

class ReplicaBucket(_message.Message):
    __slots__ = ("bucket", "progress")
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    bucket: int
    progress: str
    def __init__(self, bucket: _Optional[int] = ..., progress: _Optional[str] = ...) -> None: ...

class ReplicaStep(_message.Message):
    __slots__ = ("bucket", "progress", "idle", "lr_scale", "hyper", "late", "nonfinite", "staleness", "absent", "written")
    class HyperEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: HyperValue
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[HyperValue, _Mapping]] = ...) -> None: ...
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    IDLE_FIELD_NUMBER: _ClassVar[int]
    LR_SCALE_FIELD_NUMBER: _ClassVar[int]
    HYPER_FIELD_NUMBER: _ClassVar[int]
    LATE_FIELD_NUMBER: _ClassVar[int]
    NONFINITE_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    ABSENT_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_FIELD_NUMBER: _ClassVar[int]
    bucket: int
    progress: str
    idle: bool
    lr_scale: float
    hyper: _containers.MessageMap[str, HyperValue]
    late: int
    nonfinite: int
    staleness: _containers.RepeatedScalarFieldContainer[int]
    absent: _containers.RepeatedScalarFieldContainer[int]
    written: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, bucket: _Optional[int] = ..., progress: _Optional[str] = ..., idle: bool = ..., lr_scale: _Optional[float] = ..., hyper: _Optional[_Mapping[str, HyperValue]] = ..., late: _Optional[int] = ..., nonfinite: _Optional[int] = ..., staleness: _Optional[_Iterable[int]] = ..., absent: _Optional[_Iterable[int]] = ..., written: _Optional[_Iterable[int]] = ...) -> None: ...

class ReplicaAnswer(_message.Message):
    __slots__ = ("bucket", "worker", "codec", "whole")
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    bucket: int
    worker: str
    codec: str
    whole: bool
    def __init__(self, bucket: _Optional[int] = ..., worker: _Optional[str] = ..., codec: _Optional[str] = ..., whole: bool = ...) -> None: ...

class ReplicaRoster(_message.Message):
    __slots__ = ("membership",)
    MEMBERSHIP_FIELD_NUMBER: _ClassVar[int]
    membership: str
    def __init__(self, membership: _Optional[str] = ...) -> None: ...

class ReplicaComplete(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class ReplicaChange(_message.Message):
    __slots__ = ("configuration", "elector")
    CONFIGURATION_FIELD_NUMBER: _ClassVar[int]
    ELECTOR_FIELD_NUMBER: _ClassVar[int]
    configuration: Configuration
    elector: _containers.RepeatedCompositeFieldContainer[Elector]
    def __init__(self, configuration: _Optional[_Union[Configuration, _Mapping]] = ..., elector: _Optional[_Iterable[_Union[Elector, _Mapping]]] = ...) -> None: ...

class ReplicaData(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: str
    def __init__(self, data: _Optional[str] = ...) -> None: ...

class ReplicaNorm(_message.Message):
    __slots__ = ("worker", "session", "step", "square")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SQUARE_FIELD_NUMBER: _ClassVar[int]
    worker: str
    session: int
    step: int
    square: float
    def __init__(self, worker: _Optional[str] = ..., session: _Optional[int] = ..., step: _Optional[int] = ..., square: _Optional[float] = ...) -> None: ...

class Term(_message.Message):
    __slots__ = ("number", "server")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SERVER_FIELD_NUMBER: _ClassVar[int]
    number: int
    server: str
    def __init__(self, number: _Optional[int] = ..., server: _Optional[str] = ...) -> None: ...

class Configuration(_message.Message):
    __slots__ = ("term", "standby")
    TERM_FIELD_NUMBER: _ClassVar[int]
    STANDBY_FIELD_NUMBER: _ClassVar[int]
    term: Term
    standby: str
    def __init__(self, term: _Optional[_Union[Term, _Mapping]] = ..., standby: _Optional[str] = ...) -> None: ...

class Elector(_message.Message):
    __slots__ = ("worker", "session")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    worker: str
    session: int
    def __init__(self, worker: _Optional[str] = ..., session: _Optional[int] = ...) -> None: ...

class Ballot(_message.Message):
    __slots__ = ("ask", "declare", "standby")
    ASK_FIELD_NUMBER: _ClassVar[int]
    DECLARE_FIELD_NUMBER: _ClassVar[int]
    STANDBY_FIELD_NUMBER: _ClassVar[int]
    ask: Ask
    declare: Declare
    standby: str
    def __init__(self, ask: _Optional[_Union[Ask, _Mapping]] = ..., declare: _Optional[_Union[Declare, _Mapping]] = ..., standby: _Optional[str] = ...) -> None: ...

class Ask(_message.Message):
    __slots__ = ("term", "base")
    TERM_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    term: Term
    base: Term
    def __init__(self, term: _Optional[_Union[Term, _Mapping]] = ..., base: _Optional[_Union[Term, _Mapping]] = ...) -> None: ...

class Declare(_message.Message):
    __slots__ = ("configuration", "serving")
    CONFIGURATION_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    configuration: Configuration
    serving: bool
    def __init__(self, configuration: _Optional[_Union[Configuration, _Mapping]] = ..., serving: bool = ...) -> None: ...

class BallotPaper(_message.Message):
    __slots__ = ("vote", "accepted", "standby")
    VOTE_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    STANDBY_FIELD_NUMBER: _ClassVar[int]
    vote: Vote
    accepted: Term
    standby: str
    def __init__(self, vote: _Optional[_Union[Vote, _Mapping]] = ..., accepted: _Optional[_Union[Term, _Mapping]] = ..., standby: _Optional[str] = ...) -> None: ...

class Vote(_message.Message):
    __slots__ = ("term", "granted", "promised", "served")
    TERM_FIELD_NUMBER: _ClassVar[int]
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    PROMISED_FIELD_NUMBER: _ClassVar[int]
    SERVED_FIELD_NUMBER: _ClassVar[int]
    term: Term
    granted: bool
    promised: Term
    served: Configuration
    def __init__(self, term: _Optional[_Union[Term, _Mapping]] = ..., granted: bool = ..., promised: _Optional[_Union[Term, _Mapping]] = ..., served: _Optional[_Union[Configuration, _Mapping]] = ...) -> None: ...

class BallotRequest(_message.Message):
    __slots__ = ("worker", "session", "take_over", "paper", "secret")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TAKE_OVER_FIELD_NUMBER: _ClassVar[int]
    PAPER_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    worker: str
    session: int
    take_over: bool
    paper: _containers.RepeatedCompositeFieldContainer[BallotPaper]
    secret: bytes
    def __init__(self, worker: _Optional[str] = ..., session: _Optional[int] = ..., take_over: bool = ..., paper: _Optional[_Iterable[_Union[BallotPaper, _Mapping]]] = ..., secret: _Optional[bytes] = ...) -> None: ...

class BallotReply(_message.Message):
    __slots__ = ("ballot", "configuration", "closed")
    BALLOT_FIELD_NUMBER: _ClassVar[int]
    CONFIGURATION_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    ballot: _containers.RepeatedCompositeFieldContainer[Ballot]
    configuration: Configuration
    closed: str
    def __init__(self, ballot: _Optional[_Iterable[_Union[Ballot, _Mapping]]] = ..., configuration: _Optional[_Union[Configuration, _Mapping]] = ..., closed: _Optional[str] = ...) -> None: ...

class StandbyStatus(_message.Message):
    __slots__ = ("role", "configuration", "version", "complete", "lag_records", "lag_seconds")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONFIGURATION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    LAG_RECORDS_FIELD_NUMBER: _ClassVar[int]
    LAG_SECONDS_FIELD_NUMBER: _ClassVar[int]
    role: str
    configuration: Configuration
    version: int
    complete: bool
    lag_records: int
    lag_seconds: float
    def __init__(self, role: _Optional[str] = ..., configuration: _Optional[_Union[Configuration, _Mapping]] = ..., version: _Optional[int] = ..., complete: bool = ..., lag_records: _Optional[int] = ..., lag_seconds: _Optional[float] = ...) -> None: ...
