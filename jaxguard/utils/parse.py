"""Turn what a file or a server holds into checked values: JSON, YAML, text, and the names that become paths.

Whatever the input, these functions return a value of the expected shape or raise a JaxguardError that names the file, the line or
field, and the problem. Size, depth, counts and integers are limited, so that no input takes more than seconds or a few hundred
megabytes; the limits are the constants below.
"""

import difflib
import gzip
import json
import lzma
import os
import re
import typing
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, Field, TypeAdapter, ValidationError

from jaxguard.utils.errors import JaxguardError

T = TypeVar("T")
Fields: TypeAlias = dict[str, Any]

JSON_BYTES: Final = 2**26
"""Of a JSON document, such as config.json or results.json."""
ROWS_BYTES: Final = 2**29
"""Of a file that holds one JSON array of rows."""
LINE_BYTES: Final = 2**24
"""Of a line of a JSON-lines file."""
YAML_BYTES: Final = 2**20
"""Of a YAML document."""
FREE_BYTES, EXPANSION = 2**26, 200
"""A compressed file may unpack to so many bytes, or to so many times its own size, whichever is more."""
DEPTH: Final = 64
"""Of lists and mappings in each other."""
JSON_VALUES, YAML_VALUES = 10_000_000, 100_000
"""Of a document; in YAML, an alias counts as all that it stands for."""
INTEGERS: Final = 2**63
"""The magnitude that an integer stays below."""
NAME_BYTES: Final = 180
"""Of a name that becomes a part of a path; file systems allow 255, and some files add a suffix."""
_SHOWN = 200
_MOST_ERRORS = 10
_LONGEST_INTEGER = len(str(INTEGERS)) + 1


def read_text(path: Path, most: int = JSON_BYTES) -> str:
    """Read a UTF-8 file of at most `most` bytes."""
    try:
        if not path.is_file():
            raise JaxguardError(f"{path} is not there, or is no file")
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise JaxguardError(f"cannot read {path}: {error.strerror or error}") from None
    return _decoded(data, str(path), most)


def read_json(path: Path, shape: type[T], most: int = JSON_BYTES) -> T:
    """Read a JSON file; see parse_json."""
    return parse_json(read_text(path, most), shape, str(path), most)


def parse_json(text: str | bytes, shape: type[T], origin: str, most: int = JSON_BYTES, finite: bool = True) -> T:
    """Parse a JSON document of at most `most` bytes into a value of `shape`, as pydantic understands a type.

    Half a surrogate pair, which JSON can spell and UTF-8 cannot, becomes U+FFFD. If `finite`, NaN and infinities are refused.
    """
    text = _decoded(text, origin, most) if isinstance(text, bytes) else text
    openings = text.count("[") + text.count("{")
    if len(text) > most or openings + text.count(",") > JSON_VALUES:
        raise JaxguardError(f"{origin}: too large: at most {most:,} bytes and {JSON_VALUES:,} values are read")
    try:
        number = _finite if finite else float
        value = json.loads(text, parse_int=_integer, parse_float=number, parse_constant=number)
        deep = openings > DEPTH and not _within(value, DEPTH)
    except json.JSONDecodeError as error:
        line = f":{error.lineno}" if "\n" in text.strip() else ""
        raise JaxguardError(f"{origin}{line}: not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        deep, problem = isinstance(error, RecursionError), str(error)
        if not deep:
            raise JaxguardError(f"{origin}: {problem}") from None
    if deep:
        raise JaxguardError(f"{origin}: lists and mappings are nested more than {DEPTH} deep")
    return check(_whole(value) if _SURROGATE.search(text) else value, shape, origin)


def read_yaml(path: Path, shape: type[T]) -> T:
    """Read a YAML file; see parse_yaml."""
    return parse_yaml(read_text(path, YAML_BYTES), shape, str(path))


def parse_yaml(text: str, shape: type[T], origin: str) -> T:
    """Parse a YAML document into a value of `shape`; a field that is given twice is an error."""
    if len(text) > YAML_BYTES:
        raise JaxguardError(f"{origin}: too large: at most {YAML_BYTES:,} bytes of YAML are read")
    try:
        _count_nodes(text)
        value = yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise JaxguardError(f"{origin}: not YAML: {error}") from None
    return check(value, shape, origin)


def front_matter(path: Path) -> Fields:
    """Read the YAML between the first two lines `---` of a Markdown file; empty where there is none."""
    lines = read_text(path).lstrip().split("\n")
    fences = [number for number, line in enumerate(lines) if line.rstrip() == "---"][:2]
    if len(fences) < 2 or fences[0] != 0:
        return {}
    return parse_yaml("\n".join(lines[1 : fences[1]]), Fields, str(path))


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number, line without its end) of a UTF-8 file that may be packed with gzip or xz; numbers begin at 1."""
    number, rest = 0, b""
    for chunk in _unpacked(path):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            number += 1
            yield number, _decoded(line, f"{path}:{number}", LINE_BYTES).removesuffix("\r")
        if len(rest) > LINE_BYTES:
            break
    if rest:
        yield number + 1, _decoded(rest, f"{path}:{number + 1}", LINE_BYTES).removesuffix("\r")


def read_packed(path: Path, most: int) -> str:
    """Read a UTF-8 file that may be packed with gzip or xz."""
    data = bytearray()
    for chunk in _unpacked(path):
        data += chunk
        if len(data) > most:
            break
    return _decoded(bytes(data), str(path), most)


def check(value: Any, shape: type[T], origin: str | Callable[[str, str], str]) -> T:
    """Return a plain value as `shape`; the JaxguardError has a line for each field that is wrong.

    It begins with `origin`, or with what that returns for the field and the message.
    """
    named: Callable[[str, str], str] = (lambda *_: origin) if isinstance(origin, str) else origin
    if shape == Fields and isinstance(value, dict):  # pydantic would copy it
        bad = next((key for key in value if not isinstance(key, str)), None)
        if bad is None:
            return typing.cast("T", value)
        raise JaxguardError(f"{named('', '')}: the field {bad!r} is no text; put it in quotes")
    try:
        return _adapter(typing.cast("Any", shape)).validate_python(value)
    except JaxguardError as error:  # what a dataclass says of its fields
        raise JaxguardError(f"{origin}: {error}") from None
    except ValidationError as error:
        # Pydantic also calls a list too short when its only item is ill-formed; the item's own error says it better.
        errors = [e for e in error.errors() if not (e["type"] == "too_short" and e["input"])]
        explained = [(".".join(_path(e)), _explain(shape, e)[:1000]) for e in errors[:_MOST_ERRORS]]
        lines = [f"{named(field, message)}: {message}" for field, message in explained]
        more = [f"{named('', '')}: {len(errors) - _MOST_ERRORS} more errors"] if len(errors) > _MOST_ERRORS else []
        raise JaxguardError("\n".join([*lines, *more])) from None


@lru_cache(maxsize=256)
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


def path_part(name: str) -> str:
    """Return a name that can be a part of a path: one that stays in its folder on every system. ValueError if it cannot."""
    if name in {"", ".", ".."} or "/" in name or "\\" in name:
        raise ValueError("it becomes the name of a file or folder: it must not be empty or hold a slash")
    if len(name.encode("utf-8", "surrogatepass")) > NAME_BYTES:
        raise ValueError(f"it becomes the name of a file or folder: at most {NAME_BYTES} bytes")
    if not name.isprintable():
        raise ValueError("it becomes the name of a file or folder: it must not hold control characters")
    return name


PathPart = Annotated[str, AfterValidator(path_part)]
"""A text that becomes the name of a file or folder."""


def path_text(path: str) -> str:
    """Return a text that the system can take for a path, `~` expanded; ValueError if it cannot."""
    try:
        longest = max((len(part) for part in os.fsencode(path).split(b"/")), default=0)
        path = str(Path(path).expanduser()) if path.startswith("~") else path
    except (UnicodeEncodeError, RuntimeError) as error:
        raise ValueError(f"it is no path: {error}") from None
    if longest > 255 or "\0" in path:
        raise ValueError("it is no path: one of its parts has more than 255 bytes, or it holds NUL")
    return path


PathText = Annotated[str, AfterValidator(path_text)]
"""A text that is a path, or may be one."""
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """Return `did you mean 'x'? `: a name that is all but equal, else those that begin with it, else the most similar one."""
    known, name = list(known), name[:_SHOWN]
    longer = [each for each in known if name and each.startswith(name)][:3]
    match = (
        difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        or longer
        or difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    )
    return f"did you mean {' or '.join(map(repr, match))}? " if match else ""


def inner_schema(annotation: Any) -> type[BaseModel] | None:
    """Return the schema that a field's annotation holds, also in a union or a tuple; None if it holds none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(inner_schema, typing.get_args(annotation))), None)


def leaves(schema: type[BaseModel], fields: Iterable[str] | None = None, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted field, its annotation) for every field of a schema, or of some of its fields, that holds no other schema."""
    for name in schema.model_fields if fields is None else fields:
        annotation = schema.model_fields[name].annotation
        inner = inner_schema(annotation)
        if inner is None:
            yield f"{prefix}{name}", annotation
        else:
            index = "0." if typing.get_origin(annotation) is tuple else ""
            yield from leaves(inner, None, f"{prefix}{name}.{index}")


def find_field(schema: type[BaseModel], name: str) -> str | None:
    """Return the dotted field that `name` is, or whose last part it is, nearly; None if there is none, or it is in a list."""
    fields = [field for field, _ in leaves(schema) if ".0." not in field]
    last = {field.rpartition(".")[2]: field for field in reversed(fields)} | {field: field for field in fields}
    return next((last[each] for each in difflib.get_close_matches(name, last, n=1, cutoff=0.75)), None)


def _path(error: Any) -> list[str]:
    return [str(part) for part in error["loc"] if part != ""]  # an empty part is the tag of a union


def _explain(shape: Any, error: Any) -> str:
    path, kind, value = _path(error), error["type"], error["input"]
    field, schema = ".".join(path), inner_schema(shape)
    root = schema
    if kind == "extra_forbidden" and root is not None and schema is not None:
        for part in path[:-1]:  # an index, or a key that the user chose, is no field
            if part in schema.model_fields:
                schema = inner_schema(schema.model_fields[part].annotation) or schema
        known = list(schema.model_fields)
        full = find_field(root, path[-1])
        hint = nearest(path[-1], known, 0.75) or (f"did you mean {full!r}? " if full else nearest(path[-1], known))
        return f"unknown field {field!r}; {hint}known here: {', '.join(known)}"
    if kind == "missing":
        return f"field {field!r} is missing"
    message = _PLAIN.get(kind, error["msg"].removeprefix("Value error, "))
    if kind in _PLAIN and not field:
        return f"{message}, found {type(value).__name__}"
    if not isinstance(value, dict | BaseModel):
        message += f" (given: {shown(value)})"
    hint = nearest(str(value), re.findall(r"'([^']*)'", error["ctx"]["expected"])) if kind == "literal_error" else ""
    if kind == "model_type" and root is not None and (full := find_field(root, path[-1])):
        hint = f"did you mean {full!r}?"
    return f"{field}{': ' if field else ''}{message}{'; ' + hint.strip() if hint else ''}"


_PLAIN = {
    "tuple_type": "expected a list",
    "list_type": "expected a list",
    "dict_type": "expected fields",
    "model_type": "expected fields",
    "dataclass_type": "expected fields",
    "too_short": "expected at least one item",
    "string_type": "expected text",
}
"""Where pydantic's own message speaks of Python's types."""


def shown(value: object) -> str:
    """Return a value as errors quote it: its beginning."""
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _decoded(data: bytes, origin: str, most: int) -> str:
    if len(data) > most:
        raise JaxguardError(f"{origin}: too large: at most {most:,} bytes are read")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise JaxguardError(f"{origin}: not UTF-8 text: {error.reason} at byte {error.start}") from None


def check_unpacked(path: Path, size: int) -> None:
    """Refuse a packed file that holds many times its own size."""
    if size > FREE_BYTES and size > EXPANSION * path.stat().st_size:
        raise JaxguardError(f"{path}: unpacks to more than {size:,} bytes: unpack it yourself if you trust it")


def _unpacked(path: Path) -> Iterator[bytes]:
    """Yield a file's bytes, unpacked; JaxguardError where it is damaged or unpacks to much more than its size."""
    opened: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    unpack, total = opened.get(path.suffix, open), 0
    try:
        with unpack(path, "rb") as stream:
            while chunk := stream.read(2**20):
                total += len(chunk)
                check_unpacked(path, total)
                yield chunk
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise JaxguardError(f"{path}: truncated or damaged file ({error}); fetch it again") from None


def _integer(digits: str) -> int:
    if len(digits) > _LONGEST_INTEGER or abs(int(digits)) >= INTEGERS:
        raise ValueError(f"the integer {_cut(digits)} is too large")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if value - value != 0:
        raise ValueError(f"the number {_cut(digits)} is not finite")
    return value


def _within(value: Any, depth: int) -> bool:
    """Whether lists and mappings are nested at most so deep."""
    level = [value]
    for _ in range(depth + 1):
        level = [child for each in level if isinstance(each, dict | list) for child in _children(each)]
        if not level:
            return True
    return False


def _children(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")


def whole_text(text: str) -> str:
    """Replace halves of surrogate pairs, which UTF-8 and tokenizers refuse, by U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return whole_text(value)
    if isinstance(value, list):
        return [_whole(each) for each in value]
    return {_whole(key): _whole(each) for key, each in value.items()} if isinstance(value, dict) else value


class _Loader(yaml.CSafeLoader):
    """Reads 1e-6 as a number, which YAML 1.1 does not, and refuses a field that is given twice.

    It is the safe loader in C; the one in Python takes minutes for lists in each other.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"field {key!r} is given twice", node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        text = super().construct_scalar(node)
        if _UNTYPABLE.search(str(text)):
            raise yaml.constructor.ConstructorError(None, None, "a text holds NUL or half a character", node.start_mark)
        return text

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node) if len(node.value) <= _SHOWN else INTEGERS
        if abs(value) >= INTEGERS:
            raise yaml.constructor.ConstructorError(None, None, "an integer is too large", node.start_mark)
        return value


_UNTYPABLE = re.compile("[\0\ud800-\udfff]")
_EXPONENT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _count_nodes(text: str) -> None:
    """Raise ValueError where a YAML document is nested too deep or, its aliases expanded, has too many values."""
    sizes: dict[str, int] = {}  # of anchors whose node is complete
    open_nodes: list[tuple[str | None, int]] = []
    count = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = count - before
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"*{event.anchor} stands for what holds it, or for nothing")
            count += sizes[event.anchor]
        elif isinstance(event, yaml.NodeEvent):
            count += 1
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((event.anchor, count - 1))
            elif event.anchor:
                sizes[event.anchor] = 1
        if len(open_nodes) > DEPTH:
            raise ValueError(f"lists and mappings are nested more than {DEPTH} deep")
        if count > YAML_VALUES:
            raise ValueError(f"it has more than {YAML_VALUES:,} values, those that aliases stand for included")
