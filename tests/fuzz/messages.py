"""Hostile messages: well-formed ones with a few fields changed to what is rare, largest, of another kind, or again.

The fields come from the descriptors of the contract, so a new field is changed too.
"""

import random
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor

#: Values by the kind of a field: those around which checks are written, and the ends of the types.
WHOLE = (0, 1, 2, 3, 4, 7, 16, 255, 256, 2**31 - 1, 2**32 - 1)
WIDE = (*WHOLE, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
SIGNED = (-(2**63), -1, *WHOLE, 2**53, 2**63 - 1)
REAL = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    2.0,
    5e-324,
    2.0**-53,
    2.0**53,
    1e20,
    1e39,
    1e308,
    -1e308,
    *map(float, ("inf", "nan")),
)
TEXT = (
    "",
    "h0",
    "h1",
    "h2",
    "SGD",
    "none",
    "fp16",
    "int8",
    "topk:0.5",
    "torch.int8",
    "torch.bool",
    "\x1b[2J",
    "x" * 101,
)
NAMES = (
    "lr",
    "momentum",
    "weight_decay",
    "betas",
    "eps",
    "nesterov",
    "amsgrad",
    "maximize",
    "fused",
    "foreach",
    "zeal",
)
DATA = (b"", bytes(16), b"x" * 17)

Random = random.Random


def changed(random: Random, message: Any, times: int) -> Any:
    """``message`` after so many changes of a random field of it or of a message in it."""
    for _ in range(times):
        _change(random, message)
    return message


def _change(random: Random, message: Any) -> None:
    descriptor: Descriptor = message.DESCRIPTOR
    field = random.choice(list(descriptor.fields)) if descriptor.fields else None
    if field is None:
        return
    inner = field.message_type
    if inner is not None and inner.GetOptions().map_entry:
        values = getattr(message, field.name)
        _change(random, values[random.choice(NAMES)])
    elif field.is_repeated:
        _change_repeated(random, field, getattr(message, field.name))
    elif inner is not None:
        part = getattr(message, field.name)
        part.SetInParent()
        if field.containing_oneof is None or random.random() < 0.5:
            _change(random, part)
    elif random.random() < 0.1:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _value(random, field))


def _change_repeated(random: Random, field: FieldDescriptor, values: Any) -> None:
    """Repeat an entry, leave one out, put them out of order, or add one."""
    if len(values) and random.random() < 0.3:
        del values[random.randrange(len(values))]
    elif len(values) > 1 and random.random() < 0.3:
        shuffled = list(values)
        random.shuffle(shuffled)
        del values[:]
        values.extend(shuffled)
    elif field.message_type is not None:
        if len(values) and random.random() < 0.5:
            values.add().CopyFrom(random.choice(list(values)[:-1] or [values[0]]))
        else:
            _change(random, values.add())
    else:
        values.extend(_value(random, field) for _ in range(random.choice((1, 1, 2, 3))))


def _value(random: Random, field: FieldDescriptor) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_UINT32:
            return random.choice(WHOLE)
        case FieldDescriptor.CPPTYPE_UINT64:
            return random.choice(WIDE)
        case FieldDescriptor.CPPTYPE_INT32 | FieldDescriptor.CPPTYPE_INT64:
            return random.choice(SIGNED)
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            return random.choice(REAL)
        case FieldDescriptor.CPPTYPE_BOOL:
            return random.random() < 0.5
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_STRING:
            return random.choice(TEXT)
        case FieldDescriptor.CPPTYPE_ENUM:
            return 0
        case _:
            return random.choice(DATA)
