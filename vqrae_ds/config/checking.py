"""A raw mapping against a pydantic schema: a checked section, or one line that says what to do.

A mistake is named by the full dotted name of its key, with its value and the nearest valid name.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError, PydanticKnownError

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]


def _one_or_several(value: Any) -> Any:
    """Said here, as pydantic would list what is wrong with each of the alternatives."""
    if value == "":
        raise PydanticKnownError("string_too_short", {"min_length": 1})
    texts = value if isinstance(value, list) else [value]
    if not (texts and all(isinstance(text, str) and text for text in texts)):
        raise PydanticCustomError("texts_type", "text, or a list of texts")
    return value


Texts = Annotated[str | list[str], BeforeValidator(_one_or_several)]

SIMILAR, EQUAL = 0.75, 1.0  # cutoffs of difflib: 0.75 finds a typo or two and a missing word
SYNONYMS = {  # words of other trainers, too far from ours to be found by their letters
    "learning_rate": "lr",
    "micro_batch_size": "train_micro_batch_size_per_gpu",
    "precision": "bf16",
    "init_from": "from_run",
}
# What a value must be, by pydantic's type of error; braces are filled from the error's context.
REQUIREMENTS = {
    "int_type": "a whole number",
    "multiple_of": "a whole number",
    "float_type": "a number",
    "finite_number": "finite",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "texts_type": "text, or a list of texts that are not empty",
    "list_type": "a list",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "dict_type": "a section",
    "literal_error": "{expected}",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:.9g}",
}


class Section(BaseModel):
    """Strict, frozen, no unknown keys: `"16"` is not a number and a misspelt key is not a default.

    The message of a validator starts with the name of the field that is wrong.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


S = TypeVar("S", bound=BaseModel)


def check(
    schema: type[S],
    raw: Mapping[str, Any],
    *,
    prefix: str = "",
    source: str = "",
    describe_unknown: Callable[[str], str] | None = None,
) -> S:
    """`raw` as a `schema`. Raises `ValueError` with one line about the most telling mistake.

    `prefix` comes before every name. `source` says where a missing key is missing.
    `describe_unknown` gives the end of "NAME = VALUE ..." for a key that the schema does not have.
    """
    try:
        return schema.model_validate(raw)
    except ValidationError as invalid:
        # Unknown keys first: a misspelt key often makes another one "missing".
        errors = sorted(invalid.errors(), key=lambda e: e["type"] != "extra_forbidden")
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        names = key_names(schema)
        line = _explain(errors[0], names, source, describe_unknown or _simply_unknown(names))
        raise ValueError(prefix + line + more) from invalid


def key_names(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """All keys of a schema by their full dotted names, sections before what is in them."""
    names = []
    for key, field in schema.model_fields.items():
        names.append(prefix + key)
        for annotation in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                names += key_names(annotation, f"{prefix}{key}.")
    return names


def nearest_name(name: str, here: Sequence[str], there: Sequence[str] = ()) -> str | None:
    """The name that was probably meant, of those known `here` or in the other file (`there`).

    First a similar key of the same section, then the same key anywhere, then a similar one.
    """
    section, _, key = name.rpartition(".")
    key = SYNONYMS.get(key, key).lower()
    siblings = [n for n in here if n.rpartition(".")[0] == section]
    attempts = (
        (siblings, SIMILAR),
        (here, EQUAL),
        (there, EQUAL),
        (there, SIMILAR),
        (here, SIMILAR),
    )
    for names, cutoff in attempts:
        full_names = {n.rpartition(".")[2]: n for n in reversed(names)}  # the first one wins
        if near := difflib.get_close_matches(key, full_names, n=1, cutoff=cutoff):
            return full_names[near[0]]
    return None


def show(value: Any) -> str:
    """`value` as the files write it, on one line and not longer than 80 characters."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest_multiples(size: int, of: int, joint: str = "or") -> str:
    """The positive multiples of `of` around `size`, for a sentence."""
    low = size // of * of
    return f" {joint} ".join(str(near) for near in (low, low + of) if near > 0)


def check_image_size(size: int, token_side: int) -> None:
    """Raise `ValueError` where a side of `size` pixels is not made of whole tokens."""
    if size < 1 or size % token_side:
        nearest = nearest_multiples(max(size, 1), token_side)
        raise ValueError(
            f"{size} pixels are no multiple of {token_side}, a token's side; nearest: {nearest}"
        )


def list_keys(section: str, names: Sequence[str]) -> str:
    """The keys of one section of `names`, for a sentence."""
    return ", ".join(n.rpartition(".")[2] for n in names if n.rpartition(".")[0] == section)


def _explain(
    error: Mapping[str, Any],
    names: Sequence[str],
    source: str,
    describe_unknown: Callable[[str], str],
) -> str:
    kind, value = error["type"], error["input"]
    name = ".".join(map(str, error["loc"]))
    if kind == "missing":
        return f"{name} is missing" + (f" in {source}" if source else "")
    if kind == "value_error":  # of a section's validator, which names the field itself
        message = error["msg"].removeprefix("Value error, ")
        return f"{name}.{message}" if name else message
    start = f"{name} = {show(value)}"
    if kind == "extra_forbidden":
        if "." in error["loc"][-1]:
            return f"{start} is one key with dots: in a file, write nested sections"
        return f"{start} {describe_unknown(name)}"
    if value == "auto":
        return f"{start} has no meaning outside the Hugging Face Trainer: give the value"
    if kind == "model_type":
        return f"{start} must be a section with the keys {list_keys(name, names)}"
    return f"{start} must be {REQUIREMENTS[kind].format(**error.get('ctx', {}))}"


def _simply_unknown(names: Sequence[str]) -> Callable[[str], str]:
    def describe(name: str) -> str:
        near = nearest_name(name, names)
        return "is not a known key" + (f"; did you mean {near}?" if near else "")

    return describe
