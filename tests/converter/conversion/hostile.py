"""Checkpoints, adapters, GGUF files and recipes made to do harm: to run code, leave their folder, hang, eat memory,
crash a parser, or say two things at once. Each is given to `rkedge convert`.

`python -m tests.converter.conversion.hostile FOLDER [CASE ...]` makes them below FOLDER, one after another, and prints
for each a line of JSON: exit code, message, what was left, whether code ran, peak memory. test_hostile.py judges the
lines. (Plain damage is the subject of test_broken_inputs.py.)
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

from tests.converter.conversion.hostile_box import CASES, LFS, SECONDS, Box, case, gguf_bytes, gguf_metadata, text

from rkruntime.cli import main

# folders and config.json


@case("config.json is not JSON: 'utf-8'")
def a_config_in_latin_1(box):
    (box.model / "config.json").write_bytes('{"model_type": "gemma2", "author": "Müller"}'.encode("latin-1"))


@case("config.json is not JSON: it is nested too deeply")
def a_config_nested_deeply(box):
    (box.model / "config.json").write_text('{"a":' * 50_000)


@case("config.json is not JSON: the key 'hidden_size' occurs twice")
def a_config_with_a_key_twice(box):
    box.text(box.model / "config.json", '"hidden_size": 128', '"hidden_size": 64, "hidden_size": 128')


@case("config.json exceeds 16 MiB")
def a_config_of_a_terabyte(box):
    with (box.model / "config.json").open("wb") as file:
        file.truncate(1 << 40)


@case("it has no config.json")
def a_config_that_links_to_itself(box):
    (box.model / "config.json").unlink()
    (box.model / "config.json").symlink_to("config.json")


@case("config.json is not JSON: Exceeds the limit")
def a_size_of_ten_thousand_digits(box):
    box.text(box.model / "config.json", '"hidden_size": 128', '"hidden_size": ' + "9" * 10_000)


@case("rms_norm_eps is nan")
def a_config_with_nan(box):
    box.config(rms_norm_eps=float("nan"))


@case("rope_parameters is 'default'; it must be a table")
def rope_parameters_that_are_text(box):
    box.config(rope_parameters="default")


@case("layer_types must name 4 layers")
def layer_types_that_are_lists(box):
    box.config(layer_types=[["sliding_attention"]] * 4)


@case(r"already quantized by \[4\]")
def a_quantization_that_is_a_list(box):
    box.config(quantization_config=[4])


@case("generation_config.json: eos_token_id is 5000")
def an_end_token_outside_the_vocabulary(box):
    box.edit(box.model / "generation_config.json", eos_token_id=5000)


# safetensors and their index


@case("claims a header of 9,223,372,036,854,775,807 bytes")
def a_header_of_exabytes(box):
    data = box.shard.read_bytes()
    box.shard.write_bytes((2**63 - 1).to_bytes(8, "little") + data[8:])


@case("claims a header of 90,000,000 bytes")
def a_header_of_ninety_megabytes(box):
    text = b'{"a":' * 18_000_000
    box.shard.write_bytes(len(text).to_bytes(8, "little") + text)


@case("header of .* is not JSON: it is nested too deeply")
def a_header_nested_deeply(box):
    box.header(box.shard, lambda _: b'{"a":' * 100_000)


@case("header of .* is not JSON: the key 'x' occurs twice")
def a_tensor_twice_in_a_header(box):
    entry = b'"x": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}'
    box.header(box.shard, lambda _: b"{" + entry + b", " + entry + b"}")


def first(header: dict[str, Any]) -> dict[str, Any]:
    return next(value for key, value in header.items() if key != "__metadata__")


@case("takes .* bytes; BF16 \\[4294967296, 4294967296\\] would take")
def a_shape_whose_size_overflows(box):
    box.header(box.shard, lambda header: first(header).update(shape=[1 << 32, 1 << 32]))


def index_of(box: Box, name: str) -> None:
    path = box.model / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    key = next(key for key, value in content["weight_map"].items() if value == box.shard.name)
    content["weight_map"][key] = name
    path.write_text(json.dumps(content))


@case("names a file outside the folder: '..'")
def an_index_that_names_the_parent(box):
    index_of(box, "..")


@case(r"names a file outside the folder: 'a\\x00b'")
def an_index_with_a_nul(box):
    index_of(box, "a\0b")


@case("lacks the file loop.safetensors")
def a_shard_that_links_to_itself(box):
    (box.model / "loop.safetensors").symlink_to("loop.safetensors")
    index_of(box, "loop.safetensors")


@case("lacks the file pipe.safetensors")
def a_shard_that_is_a_pipe(box):
    os.mkfifo(box.model / "pipe.safetensors")
    index_of(box, "pipe.safetensors")


@case("has no weight_map")
def an_index_that_is_a_list(box):
    box.edit(box.model / "model.safetensors.index.json", weight_map=["a"])


@case("index.json is a Git LFS pointer")
def a_pointer_for_an_index(box):
    (box.model / "model.safetensors.index.json").write_bytes(LFS)


# .bin files


@case("asks for posix.system")
def a_bin_with_code(box):
    box.as_bin(box.code())


@case("is not a .bin file of torch 1.6 or newer")
def a_bare_pickle_with_code(box):
    box.as_bin(b"").write_bytes(box.code())


@case("asks for builtins.eval")
def a_bin_that_evaluates(box):
    box.as_bin(b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.")


@case("without an uncompressed data.pkl of reasonable size")
def a_zip_bomb(box):
    box.as_bin(b"\0" * (100 << 20), how=zipfile.ZIP_DEFLATED)


@case("is not a plain table of tensors: expected 4611686018427387904 bytes")
def a_pickle_that_claims_exabytes(box):
    box.as_bin(b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"x")


@case("it describes more than any weights need")
def a_pickle_nested_deeply(box):
    box.as_bin(b"\x80\x02" + b"]" * 500_000 + b"a" * 499_999 + b".")


def tensor_pickle(shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """As torch.save describes one tensor; protocol 2 by hand."""

    def number(value: int) -> bytes:
        return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(X\x07\0\0\0storagectorch\nBFloat16Storage\nX\x01\0\0\0" + b"0X\x03\0\0\0cpuK\x04tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0" + numbers(shape) + numbers(stride) + b"\x89}tR"
    return b"\x80\x02}X\x19\0\0\0model.embed_tokens.weight" + tensor + b"s."


@case("larger than its storage")
def a_bin_that_points_beyond(box):
    # The last element that these strides reach is the fifth; without them four would fit.
    box.as_bin(tensor_pickle((2, 2), (1, 3)), {"data/0": bytes(8)})


@case("does not contain the bytes of the tensor")
def a_bin_with_compressed_bytes(box):
    box.as_bin(tensor_pickle((2, 2), (2, 1)), {"data/0": bytes(8)}, zipfile.ZIP_DEFLATED)


@case("has an impossible shape, strides or offset")
def a_bin_with_a_shape_below_zero(box):
    box.as_bin(tensor_pickle((-2, 2), (2, 1)), {"data/0": bytes(8)})


@case("too large to rearrange")
def a_bin_with_one_number_for_many(box):
    box.as_bin(tensor_pickle((1 << 20, 1 << 20), (0, 0)), {"data/0": bytes(8)})


# tokenizer and template


@case("tokenizer.json is a Git LFS pointer")
def a_pointer_for_a_tokenizer(box):
    (box.model / "tokenizer.json").write_bytes(LFS)


def template(box: Box, text: str) -> None:
    (box.model / "chat_template.jinja").write_text(text)


@case("chat template took more than 2 seconds of CPU time")
def a_template_that_never_ends(box):
    loop = "{% for a in range(99999) %}"
    template(box, loop * 4 + "{% endfor %}" * 4 + "{{ messages[0].content }}")


@case("chat template took more than 1024 MiB of memory")
def a_template_that_eats_memory(box):
    template(box, "{% set x = 'x' * 40000000000 %}{{ messages[0].content }}")


@case("chat template cannot be rendered: .*expected")
def a_template_with_a_typing_error(box):
    template(box, "{% for m in messages %}{{ m.content }")


@case("chat_template.jinja is not UTF-8")
def a_template_in_utf_16(box):
    (box.model / "chat_template.jinja").write_bytes("{{ messages }}".encode("utf-16"))


@case("chat_template.jinja exceeds 1,048,576 bytes")
def a_template_of_megabytes(box):
    template(box, "ü" * 1_000_000)


# adapters


def lora_config(box: Box, **changes: Any) -> None:
    box.edit(box.adapter / "adapter_config.json", **changes)


def lora_file(box: Box) -> Path:
    return box.adapter / "adapter_model.safetensors"


@case("There is no adapter .*nowhere")
def an_adapter_that_is_not_there(box):
    return [box.model, "--lora", box.root / "nowhere"]


@case("'half' is not a number")
def a_weight_that_is_a_word(box):
    return [box.model, "--lora", f"{box.adapter}=half"]


@case("'nan' is not a number")
def a_factor_that_is_nan(box):
    return [box.model, "--lora", f"{box.adapter}=nan"]


@case("adapter_config.json is not JSON: 'utf-16")
def an_adapter_in_utf_16(box):
    (box.adapter / "adapter_config.json").write_bytes(json.dumps({"peft_type": "LORA"}).encode("utf-16")[:-1])


@case("the rank of .* is 0.5; it must be a whole number")
def a_rank_of_a_half(box):
    lora_config(box, r=0.5)


@case("r of .* is inf; it must be a positive number")
def an_endless_rank(box):
    box.text(box.adapter / "adapter_config.json", '"r": 8', '"r": 1e400')


@case("is not a regular expression")
def a_pattern_that_is_none(box):
    lora_config(box, alpha_pattern={"[": 4})


@case("rank_pattern is a list, not a table")
def patterns_that_are_a_list(box):
    lora_config(box, rank_pattern=[["q_proj", 4]])


@case("init_lora_weights is .'a'., which is unknown")
def a_beginning_that_is_a_list(box):
    lora_config(box, init_lora_weights=["a"])


@case("adapter_model.bin is not a plain table of tensors: it asks for posix.system")
def an_adapter_with_code(box):
    lora_file(box).unlink()
    with zipfile.ZipFile(box.adapter / "adapter_model.bin", "w") as archive:
        archive.writestr("m/data.pkl", box.code())


@case("adapter_model.safetensors.index.json names a file outside the folder")
def an_adapter_whose_index_leaves_the_folder(box):
    lora_file(box).unlink()
    (box.adapter / "adapter_model.safetensors.index.json").write_text('{"weight_map": {"a": "../../x"}}')


@case("trainable_token_indices is")
def token_indices_that_are_words(box):
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"

    def change(header: dict[str, Any]) -> dict[str, Any]:
        key, value = next((key, value) for key, value in header.items() if value.get("shape") == [8, 128])
        del header[key]
        return {**header, name: value}

    box.header(lora_file(box), change)
    lora_config(box, trainable_token_indices=["a"])


# GGUF


@case("model.gguf is cut: blk.3.post_ffw_norm.weight ends at byte")
def a_gguf_cut_in_its_data(box):
    path = box.gguf()
    os.truncate(path, path.stat().st_size - 100)
    return [path]


@case("its header claims 1,048,577 values")
def a_gguf_of_too_many_values(box):
    path = box.root / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, (1 << 20) + 1) + bytes(100))
    return [path]


@case("an array of its header has the unknown type 9")
def a_gguf_of_arrays_in_arrays(box):
    path = box.root / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + text("a") + struct.pack("<IIQ", 9, 9, 1) * 50)
    return [path]


@case("its alignment is 0")
def a_gguf_aligned_to_nothing(box):
    return [box.gguf(metadata={"general.alignment": 0})]


@case("has 4294967295 dimensions")
def a_gguf_tensor_of_too_many_dimensions(box):
    data = gguf_bytes()
    at = data.index(text("token_embd.weight")) + len(text("token_embd.weight"))
    path = box.root / "model.gguf"
    path.write_bytes(data[:at] + b"\xff\xff\xff\xff" + data[at + 4 :])
    return [path]


@case("has the shape \\[4294967296, 4294967296\\]")
def a_gguf_tensor_whose_size_overflows(box):
    return [box.gguf(shapes={"token_embd.weight": (1 << 32, 1 << 32)})]


@case("token_embd.weight ends at byte 9,223,")
def a_gguf_tensor_beyond_the_file(box):
    return [box.gguf(offset=2**63 - 2**20)]


@case("the tensor model.* overlaps another one")
def gguf_tensors_in_one_place(box):
    return [box.gguf(offset=0)]


@case("has the type 999")
def a_gguf_tensor_of_an_unknown_type(box):
    return [box.gguf(kind=999)]


@case("its header has the tensor 'token_embd.weight' twice")
def a_gguf_tensor_twice(box):
    return [box.gguf(twice=True)]


@case("model.embed_tokens.weight has NaN or infinite weights")
def a_gguf_with_nan(box):
    return [box.gguf(fill=float("nan"))]


@case("has a duplicate token")
def a_gguf_with_a_token_twice(box):
    tokens = gguf_metadata()["tokenizer.ggml.tokens"]
    return [box.gguf(metadata={"tokenizer.ggml.tokens": ["a", "a", *tokens[2:]]})]


@case("a token of 4,000,000 characters")
def a_gguf_token_of_megabytes(box):
    tokens = gguf_metadata()["tokenizer.ggml.tokens"]
    return [box.gguf(metadata={"tokenizer.ggml.tokens": [*tokens[:-1], "x" * 4_000_000]})]


@case("num_hidden_layers is 'four'")
def a_gguf_whose_size_is_text(box):
    return [box.gguf(metadata={"gemma2.block_count": "four"})]


@case("has eight heads for a width of 128")
def a_gguf_whose_heads_are_text(box):
    return [box.gguf(metadata={"gemma2.attention.head_count": "eight"})]


@case("has the architecture \"\\['gemma2'\\]\"")
def a_gguf_whose_architecture_is_a_list(box):
    return [box.gguf(metadata={"general.architecture": ["gemma2"]})]


@case("no tokenizer.ggml.tokens, a list of str")
def a_gguf_whose_tokens_are_numbers(box):
    return [box.gguf(metadata={"tokenizer.ggml.tokens": list(range(1024))})]


@case("a tokenizer 'gpt2'")
def a_gguf_with_another_tokenizer(box):
    return [box.gguf(metadata={"tokenizer.ggml.model": "gpt2"})]


# recipes


@case("cannot be read: Is a directory")
def a_folder_for_a_recipe(box):
    return [box.model, "--recipe", box.model]


@case("aliases are not accepted")
def a_recipe_that_grows(box):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{at}: &a{at} [{', '.join([f'*a{at - 1}'] * 9)}]" for at in range(1, 12)]
    return box.recipe("\n".join(lines))


@case("nested over 32 deep")
def a_recipe_nested_deeply(box):
    return box.recipe("lora: " + "[" * 100_000)


@case("tags are not accepted")
def a_recipe_with_code(box):
    return box.recipe(f"output: !!python/object/apply:os.system ['touch {box.executed}']")


@case("recipe.yaml: is not YAML: 'utf-8'")
def a_recipe_in_latin_1(box):
    return box.recipe("output: Müller".encode("latin-1"))


@case("recipe.yaml: cannot be read: it has more than 1,048,576 bytes")
def a_recipe_of_megabytes(box):
    return box.recipe("#" * (2 << 20))


class Hung(BaseException):
    """Raised by the alarm, past everything that catches errors."""


def stop(*_: Any) -> None:
    raise Hung


def peak_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def run(name: str, folder: Path) -> dict[str, Any]:
    """Make one case and give it to the command."""
    words, make = CASES[name]
    box, out = Box(folder / name), folder / name / "out"
    out.mkdir(parents=True)
    arguments = make(box)
    arguments = [box.model, *(f"--lora={path}" for path in box.lora)] if arguments is None else arguments
    Path("/proc/self/clear_refs").write_text("5")
    before, said = peak_kib(), io.StringIO()
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            code = main(["convert", *map(str, arguments), "-q", "-o", str(out / "bundle")])
    except Hung:
        code = -1
    finally:
        signal.alarm(0)
    return {
        "name": name,
        "words": words,
        "code": code,
        "said": said.getvalue().replace(str(folder / name), "..."),
        "left": sorted(path.name for path in out.iterdir()),
        "executed": box.executed.exists(),
        "mib": (peak_kib() - before) >> 10,
    }


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    # The hub is not asked for what looks like one of its names.
    os.environ["HF_HUB_OFFLINE"] = "1"
    for at in sys.argv[2:] or CASES:
        print(json.dumps(run(at, Path(sys.argv[1]))), flush=True)
