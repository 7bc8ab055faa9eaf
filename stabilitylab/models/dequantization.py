"""Checkpoints of codes with scales beside them, rewritten as plain numbers before anything opens them.

A loader that does not know a checkpoint's number format may take codes for weights without a word, and everything measured on such
a model is false. So this module understands tensors that are no floats, or refuses them:

    format     codes                             scale                                          value
    fp8        P E4M3 or E5M2                    P_scale, P_scale_inv: one, a row, a block      code x scale
               L._weight_qdata (torchao)         L._weight_scale: one, a row, a block           code x scale, for L.weight
    mxfp8      P E4M3 or E5M2                    P_scale E8M0 or its exponent in a byte         code x 2^(e - 127)
    int8       P int8                            P_scale, without zero points                   code x scale
    mxfp4      P_blocks, 2 codes a byte          P_scales, a byte 32 codes                      code x 2^(e - 127)
    nvfp4      P or P_packed, 2 codes a byte     P_scale E4M3 a 16 codes, P_scale_2             code x scale x scale_2
                                                 or P_global_scale                              code x scale / global

``_scale_inv`` multiplies too, whatever its name says (DeepSeek-V3). Of two codes in a byte the lower half is the first. A scale of
one dimension belongs to rows; a scale smaller than its weight belongs to blocks, of the size that the config says
(``weight_block_size``, compressed-tensors' ``block_structure`` and ``group_size``). Where the config says none, several sizes make
as many blocks: the power of two among them is taken, and a note says so. The module writes the plain copy tensor by tensor into a
temporary folder, in 16 bits where that changes no bit, so memory holds one tensor at a time.

Sources: OCP 8-bit Floating Point (OFP8) 1.0; OCP Microscaling Formats (MX) 1.0; DeepSeek-V3 (arXiv:2412.19437), section 3.3; the
files of gpt-oss, ModelOpt, compressed-tensors.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stabilitylab.errors import InputError
from stabilitylab.formats import E2M1, decode, unpack_4bit
from stabilitylab.models.quantization_config import refuse_what_is_not_read, told_quantization
from stabilitylab.models.weight_checks import narrowest
from stabilitylab.models.weight_files import FLOATS, StoredTensor, stored_tensors, unnamed_files

_FP8 = {"F8_E4M3", "F8_E5M2"}
_EXPONENTS = {"U8", "F8_E8M0"}
_BLOCKS = (128, 64, 32, 16)
# What belongs to a stored number format. Scales of activations are of no use here: activations are read as they come.
COMPANION = re.compile(
    r"(_scale|_scale_inv|_scale_2|_global_scale|_zero_point|[._]scales|[._]qweight|[._]qzeros|[._]g_idx|\.absmax|\.quant_map"
    r"|\.nested_absmax|\.nested_quant_map|\.SCB|\.weight_format|_shape|\.codes|\.codebooks|_packed|_blocks|\.quant_state\..*)$"
)
OF_ACTIVATIONS = re.compile(r"(input|output|act|activation|[qkv])(_global)?_(scale(_ub)?|zero_point|amax)$")
_SHARD_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Codes:
    """A weight as it lies in the files: codes, and what multiplies them.

    Attributes:
        name: of the plain weight.
        format: "fp8", "mxfp8", "int8", "mxfp4" or "nvfp4".
        codes, scale: where they are.
        second: nvfp4's scale of the tensor; None elsewhere.
        block: rows and columns of a block, as the config says; None where it says nothing.
    """

    name: str
    format: str
    codes: StoredTensor
    scale: StoredTensor
    second: StoredTensor | None = None
    block: tuple[int, int] | None = None

    @property
    def supposed(self) -> tuple[int, ...]:
        """Block sizes that nobody states, where other sizes would make as many blocks; none where there is no doubt."""
        return tuple(
            size
            for dim, size in enumerate(self.sizes)
            if self.block is None and size and 1 < self.scale.shape[dim] < self.codes.shape[dim]
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of each dimension that share a scale; 0 where a scale does not fit. Empty for two codes in a byte."""
        have, want = self.scale.shape, self.codes.shape
        if len(have) != len(want) or self.format in ("mxfp4", "nvfp4"):
            return ()
        told = (*[None] * (len(want) - 2), *(self.block or (None, None)))[-len(want) :]
        return tuple(_block_of(*sizes) for sizes in zip(have, want, told, strict=True))

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors that the weight is made of."""
        return tuple(part.name for part in (self.codes, self.scale, self.second) if part is not None)


@contextmanager
def plain_folder(folder: Path) -> Iterator[tuple[Path, Mapping[str, StoredTensor], tuple[str, ...]]]:
    """A folder of plain numbers: the given one, or a temporary copy with its codes turned into numbers.

    Yields:
        The folder, what its files hold, and notes on what was converted.

    Raises:
        InputError: it holds codes that are not understood.
    """
    stored = stored_tensors(folder)
    found = understood(folder, stored)
    refuse_what_is_not_read(folder, codes=bool(found))
    aside = unnamed_files(folder)
    if not found:
        yield folder, stored, aside
        return
    with tempfile.TemporaryDirectory(prefix="stabilitylab-") as name:
        plain = Path(name)
        for file in folder.iterdir():
            if (
                file.is_file()
                and file.suffix in (".json", ".txt", ".model", ".jinja")
                and "index" not in file.name
            ):
                shutil.copyfile(file, plain / file.name)
        _without_quantization(plain / "config.json")
        _write(plain, stored, found)
        kinds = sorted({one.format for one in found})
        notes = [*aside, f"{len(found)} weights stored in {' and '.join(kinds)} are read as code x scale"]
        if supposed := [one for one in found if one.supposed]:
            sizes = " x ".join(map(str, supposed[0].supposed))
            notes.append(
                f"{len(supposed)} of them have scales of blocks whose size its config does not say: it is taken to be {sizes}, "
                f"as of {supposed[0].name}"
            )
        yield plain, stored_tensors(plain), tuple(notes)


def understood(folder: Path, stored: Mapping[str, StoredTensor]) -> list[Codes]:
    """Which weights are stored as codes, and how.

    Raises:
        InputError: some are, in a way that is not in the table above.
    """
    block = _told_block(folder)
    found = [
        replace(one, block=(1, 32) if one.format == "mxfp8" else block)
        for tensor in stored.values()
        if (one := _recognise(tensor, stored)) is not None
    ]
    known = {name for one in found for name in one.parts}
    for tensor in stored.values():
        if tensor.is_matrix_of_codes and tensor.name not in known:
            layer = tensor.name.rpartition(".")[0] + "."
            beside = [
                n for n in sorted(stored) if n.startswith(layer) and COMPANION.search(n) and n != tensor.name
            ][:3]
            what = f"with {', '.join(beside)} beside it" if beside else "without scales beside it"
            raise InputError(
                f"{folder} stores {tensor.name} as {tensor.dtype} codes {what}, which is not understood here: give the "
                "checkpoint in bf16, or dequantize it with the library that wrote it"
            )
    zero_points = {f"{one.codes.name.removesuffix('_packed')}_zero_point" for one in found}
    for name in sorted(zero_points & stored.keys()):
        raise InputError(
            f"{folder} has zero points ({name}), which are not understood here: give the checkpoint in bf16, or dequantize "
            "it with the library that wrote it"
        )
    return found


def _recognise(tensor: StoredTensor, stored: Mapping[str, StoredTensor]) -> Codes | None:
    name = tensor.name

    def beside(*suffixes: str) -> StoredTensor | None:
        return next((stored[base + suffix] for suffix in suffixes if base + suffix in stored), None)

    if name.endswith("_blocks") and tensor.dtype == "U8":
        base = name.removesuffix("_blocks")
        scale = beside("_scales")
        if scale is not None and scale.dtype in _EXPONENTS and scale.shape == tensor.shape[:-1]:
            return Codes(name=base, format="mxfp4", codes=tensor, scale=scale)
        return None
    base = name.removesuffix("_packed")
    if name.endswith("._weight_qdata") and tensor.dtype in _FP8:  # as torchao flattens its tensors
        layer = name.removesuffix("_weight_qdata")
        scale = stored.get(f"{layer}_weight_scale")
        others = [n for n in stored if n.startswith(f"{layer}_weight_")]
        known = scale is not None and scale.dtype in FLOATS and len(others) == 2
        return (
            Codes(name=f"{layer}weight", format="fp8", codes=tensor, scale=scale) if known and scale else None
        )
    scale = beside("_scale", "_scale_inv")
    if not tensor.is_matrix_of_codes or scale is None:
        return None
    if tensor.dtype in _FP8 or (tensor.dtype == "I8" and scale.dtype in FLOATS):
        kind = "int8" if tensor.dtype == "I8" else "mxfp8" if scale.dtype in _EXPONENTS else "fp8"
        known = scale.dtype in FLOATS | _EXPONENTS
        return Codes(name=base, format=kind, codes=tensor, scale=scale) if known else None
    if tensor.dtype != "U8" or len(scale.shape) != len(tensor.shape):
        return None
    group = 2 * tensor.shape[-1] / scale.shape[-1]
    if scale.dtype in _EXPONENTS and group == 32:
        return Codes(name=base, format="mxfp4", codes=tensor, scale=scale)
    second = beside("_scale_2", "_global_scale")
    if scale.dtype == "F8_E4M3" and group == 16 and second is not None:
        return Codes(name=base, format="nvfp4", codes=tensor, scale=scale, second=second)
    return None


def dequantized(one: Codes, codes: Tensor, scale: Tensor, second: Tensor | None = None) -> Tensor:
    """The numbers that codes stand for, float32.

    Args:
        one: what the codes are.
        codes, scale, second: the stored tensors.
    """
    if one.format in ("fp8", "mxfp8", "int8"):
        value = codes.float()
        factor = _spread(_scale_value(scale), value.shape, one)
        if bool(((factor <= 0) & (value != 0)).any()):
            raise InputError(
                f"{one.scale.file.parent}: {one.scale.name} has scales of zero or less, which leave nothing of "
                f"{one.codes.name}: use an intact checkpoint"
            )
        return value * factor
    if one.codes.name.endswith("_blocks"):  # [..., rows, groups, 16] with scales [..., rows, groups]
        value = _e2m1(codes) * _scale_value(scale)[..., None]
        rows = value.flatten(-2)
        # gpt-oss keeps its experts' matrices as [experts, out, in] and its model has them as [experts, in, out].
        return rows.transpose(-1, -2).contiguous() if rows.dim() == 3 else rows
    value = _e2m1(codes)
    scaled = value * _spread(_scale_value(scale), value.shape, one)
    if second is None:
        return scaled
    factor = (
        second.float().reshape(-1, *[1] * (value.dim() - 1))
        if second.numel() > 1
        else second.float().reshape(())
    )
    assert one.second is not None
    return scaled / factor if one.second.name.endswith("_global_scale") else scaled * factor


def _scale_value(scale: Tensor) -> Tensor:
    """A scale as a number; a byte is in E8M0, the exponent of a power of two, 127 above it."""
    return (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()


def _e2m1(byte: Tensor) -> Tensor:
    """Two numbers a byte, [..., n] -> [..., 2 n]."""
    return decode(unpack_4bit(byte), E2M1)


def _spread(scale: Tensor, shape: torch.Size, one: Codes) -> Tensor:
    """A scale for every number of the weight."""
    if scale.numel() == 1:
        return scale.reshape(())
    blocks = scale.dim() == len(shape)
    if not blocks:  # one dimension belongs to rows (of experts: to experts)
        scale = scale.reshape(*scale.shape, *[1] * (len(shape) - scale.dim()))
    told = (*[None] * (len(shape) - 2), *(one.block or (None, None)))[-len(shape) :]
    for dim, (have, want) in enumerate(zip(scale.shape, shape, strict=True)):
        if have in (1, want):
            continue
        block = _block_of(have, want, told[dim]) if blocks else 0
        if not block:
            said = f" in blocks of {told[dim]}" if blocks and told[dim] else ""
            raise InputError(
                f"{one.scale.file.parent}: {one.scale.name} {tuple(one.scale.shape)} does not fit {one.codes.name} "
                f"{tuple(one.codes.shape)}{said}: use an intact checkpoint"
            )
        scale = scale.repeat_interleave(block, dim).narrow(dim, 0, want)
    return scale


def _block_of(have: int, want: int, told: int | None = None) -> int:
    """How many of ``want`` numbers share one of ``have`` scales; 0 where that cannot be."""
    if have in (1, want):
        return want // have
    if told:
        return told if -(-want // told) == have else 0
    usual = next((size for size in _BLOCKS if -(-want // size) == have), 0)
    return usual or (want // have if want % have == 0 else 0)


def _told_block(folder: Path) -> tuple[int, int] | None:
    """Rows and columns of a block of scales, as a folder's config says; None where it says nothing, or several sizes."""
    told = told_quantization(folder)
    if told is None:
        return None
    groups = told.get("config_groups")
    weights = [group.get("weights") for group in groups.values()] if isinstance(groups, dict) else []
    said = {_pair(told.get("weight_block_size"))}
    for one in weights:
        if isinstance(one, dict):
            width = one.get("group_size")
            said.add(_pair(one.get("block_structure") or ([1, width] if width else None)))
    said.discard(None)
    return said.pop() if len(said) == 1 else None


def _pair(told: object) -> tuple[int, int] | None:
    if isinstance(told, list) and len(told) == 2 and all(isinstance(n, int) and n > 0 for n in told):
        return told[0], told[1]
    return None


def _without_quantization(config: Path) -> None:
    held = json.loads(config.read_text(encoding="utf-8"))
    for part in (held, *(value for value in held.values() if isinstance(value, dict))):
        for name in ("quantization_config", "compression_config"):
            part.pop(name, None)
    config.write_text(json.dumps(held), encoding="utf-8")


def _write(plain: Path, stored: Mapping[str, StoredTensor], found: list[Codes]) -> None:
    """Plain tensors in files of about a gigabyte, and their index."""
    consumed = {name for one in found for name in one.parts}
    left = [t for t in stored.values() if t.name not in consumed and not OF_ACTIVATIONS.search(t.name)]
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        if shard:
            file = f"plain-{len(set(weight_map.values())):05d}.safetensors"
            save_file(shard, plain / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(shard, file))
            shard.clear()

    def add(name: str, tensor: Tensor) -> None:
        shard[name] = tensor
        if sum(held.nbytes for held in shard.values()) > _SHARD_BYTES:
            flush()

    for plain_tensor in left:
        add(plain_tensor.name, _read(plain_tensor))
    for one in found:
        second = None if one.second is None else _read(one.second)
        add(one.name, narrowest(dequantized(one, _read(one.codes), _read(one.scale), second)))
    flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (plain / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _read(one: StoredTensor) -> Tensor:
    # Each call maps the file anew, so that no tensor keeps another in memory.
    with safe_open(one.file, framework="pt") as file:
        tensor: Tensor = file.get_tensor(one.name)
        return tensor
