"""Corpus, tokenizer and shards: building happens once, can resume, and says clearly what is wrong."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from glm.cli import main
from glm.data import packages
from glm.data.corpus import build_corpus
from glm.data.documents import Corpus
from glm.data.files import find_files, read_documents
from glm.data.sharding import build_shards, is_held_out
from glm.data.shards import open_data
from glm.data.tokenizer import Tokenizer
from glm.errors import InputError

RECORDS = [{"text": "First document.\nTwo lines."}, {"text": "第二篇文档", "language": "zh", "group": "b"}]


def write(path, records=RECORDS):
    if path.name.endswith(".parquet"):
        pq.write_table(pa.table({"text": [r["text"] for r in records]}), path)
        return path
    text = "\n".join(r["text"] if ".txt" in path.name else json.dumps(r) for r in records) + "\n"
    raw = text.encode()
    if path.suffix == ".gz":
        raw = gzip.compress(raw)
    elif path.suffix == ".zst":
        raw = zstandard.compress(raw)
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize(
    "name", ["a.txt", "a.txt.gz", "a.txt.zst", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"]
)
def test_every_kind_of_file_is_read(tmp_path, name):
    texts = [document.text for document in read_documents(write(tmp_path / name))]
    assert "\n".join(texts) == "First document.\nTwo lines.\n第二篇文档"


def test_long_text_is_cut_into_documents(tmp_path):
    (tmp_path / "a.txt").write_text(("word " * 100 + "\n\n") * 50 + "x" * 60_000)
    documents = list(read_documents(tmp_path / "a.txt"))
    assert max(len(d.text) for d in documents) <= 40_000
    assert sum(len(d.text.replace("\n", "")) for d in documents) >= 50 * 499 + 60_000


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"caf\xe9 latin-1", "not UTF-8"),
        ("a.txt", b"\x00\x01\x02binary", "zero byte"),
        ("a.txt", b"", "every file is empty"),
        ("a.txt", b"  \n \n", "every file is empty"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", b'{"words": "x"}\n', 'line 1 has no "text"'),
        ("a.jsonl", b'["x"]\n', "line 1 is not an object"),
        ("a.txt.gz", b"not gzip at all", "cannot be decompressed"),
        ("a.txt.zst", b"not zstd at all", "cannot be decompressed"),
        ("a.txt.gz", gzip.compress(b"x" * 5000, mtime=0)[:-9], "cannot be decompressed"),
        ("a.parquet", b"PAR1 no", "not a readable Parquet file"),
        ("a.docx", b"", "of no known kind"),
    ],
)
def test_wrong_files_are_named(tmp_path, capsys, name, content, says):
    (tmp_path / name).write_bytes(content)
    assert main(["corpus", str(tmp_path / name), "--out", str(tmp_path / "corpus")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert says in said
    assert str(tmp_path) in said
    assert not (tmp_path / "corpus").exists()


def test_missing_and_empty_sources(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        find_files((tmp_path / "none",))
    with pytest.raises(InputError, match="holds no text"):
        find_files((tmp_path,))
    pq.write_table(pa.table({"words": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match='no column "text": its columns are words'):
        list(read_documents(tmp_path / "a.parquet"))


def test_a_second_run_does_nothing_and_another_is_refused(tmp_path):
    source = write(tmp_path / "a.jsonl")
    build_corpus((source,), tmp_path / "corpus", None)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "corpus").iterdir()}
    corpus = build_corpus((source,), tmp_path / "corpus", None)
    assert before == {p.name: p.stat().st_mtime_ns for p in corpus.path.iterdir()}
    assert corpus.documents == 2
    with pytest.raises(InputError, match="other inputs or settings"):
        build_corpus((source,), tmp_path / "corpus", 5)


BUILD_AND_DIE = """
    import os, signal, sys
    from pathlib import Path
    from glm.data import corpus
    write = corpus._write_source
    def die_in_the_third(part, folder, number, *rest):
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(part, folder, number, *rest)
    corpus._write_source = die_in_the_third
    corpus.build_corpus((Path(sys.argv[1]),), Path(sys.argv[2]), None)
"""


def test_a_killed_build_goes_on_where_it_was(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(4):
        write(source / f"{number}.jsonl", [{"text": f"document {number}"}])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BUILD_AND_DIE), str(source), str(tmp_path / "corpus")],
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    partial = tmp_path / "corpus.partial"
    kept = (partial / "documents-00001.parquet").stat().st_mtime_ns
    assert not (tmp_path / "corpus").exists()
    time.sleep(0.01)
    corpus = build_corpus((source,), tmp_path / "corpus", None)
    assert (corpus.path / "documents-00001.parquet").stat().st_mtime_ns == kept
    assert [d.text for d in corpus] == [f"document {n}" for n in range(4)]
    assert not partial.exists()


HOLD = """
    import sys, time
    from pathlib import Path
    from glm.data.build_once import build_once
    def work(folder):
        print("working", flush=True)
        time.sleep(600)
        return {}
    build_once(Path(sys.argv[1]), what="corpus", made_by="glm corpus", fingerprint="f", work=work)
"""


def test_two_builds_into_one_folder(tmp_path):
    out = tmp_path / "corpus"
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLD), str(out)], stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(InputError, match="being made by another process"):
            build_corpus((write(tmp_path / "a.jsonl"),), out, None)
        holder.kill()
    assert build_corpus((tmp_path / "a.jsonl",), out, None).documents == 2


LIMITED = """
    import resource, signal, sys
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    from glm.cli import main
    sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_is_one_line(tmp_path):
    # A file size limit makes the same write fail that a full disk would; it says EFBIG where a disk says ENOSPC.
    rng = np.random.default_rng(0)
    records = [{"text": rng.bytes(400).hex()} for _ in range(5000)]
    source = write(tmp_path / "a.jsonl", records)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(LIMITED),
            "corpus",
            str(source),
            "--out",
            str(tmp_path / "corpus"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: there is no room to write")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "corpus").exists()


MEASURE = """
    import resource, sys
    from pathlib import Path
    from glm.data.files import read_documents
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    characters = sum(len(d.text) for d in read_documents(Path(sys.argv[1])))
    print(characters, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_is_bounded(tmp_path):
    # 200 MB of text without a single line break, 20 kB compressed: read whole it would show.
    with zstandard.open(tmp_path / "a.txt.zst", "wb") as file:
        for _ in range(200):
            file.write(b"word " * 200_000)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), str(tmp_path / "a.txt.zst")],
        capture_output=True,
        text=True,
        check=True,
    )
    characters, megabytes = map(int, done.stdout.split())
    assert characters > 190_000_000
    assert megabytes < 50


def test_tokenizer_round_trip(data):
    tokenizer = data.tokenizer
    for text in (
        "Plain words, and 中文。",
        "line\nbreaks\n\nkept",
        "🙂 emoji and ñ",
        "[MASK] <sop> are only text",
    ):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert not {tokenizer.special.mask, tokenizer.special.sop} & set(tokens)


def test_tokenizers_that_are_not_ours(tmp_path, capsys):
    (tmp_path / "tokenizer.model").write_bytes(b"nothing")
    with pytest.raises(InputError, match="not a SentencePiece model"):
        Tokenizer(tmp_path)
    with pytest.raises(InputError, match=r"no tokenizer\.model"):
        Tokenizer(tmp_path / "none")
    import io

    import sentencepiece as spm

    foreign = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words of a text"] * 50),
        model_writer=foreign,
        vocab_size=16,
        hard_vocab_limit=False,  # releases of sentencepiece find one piece more or less in so little text
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(foreign.getvalue())
    with pytest.raises(InputError, match=r"lacks GLM's special tokens .*\[gMASK\]"):
        Tokenizer(tmp_path)


def test_too_little_text_for_the_vocabulary(tmp_path, capfd):
    build_corpus((write(tmp_path / "a.jsonl"),), tmp_path / "corpus", None)
    code = main(
        [
            "tokenizer",
            "--corpus",
            str(tmp_path / "corpus"),
            "--out",
            str(tmp_path / "t"),
            "--vocabulary",
            "5000",
        ]
    )
    assert code == 2
    assert "lower --vocabulary" in capfd.readouterr().err


def test_shards_hold_the_documents_and_groups_stay_together(data, data_folder, text_files):
    corpus = Corpus.open(data_folder.parent / "corpus")
    special = data.tokenizer.special
    held = {d.group for d in corpus if is_held_out(d.group, 0.1)}
    assert held
    expected = {}
    for document in corpus:
        split = "heldout" if document.group in held else "train"
        documents = expected.setdefault((split, document.source, document.language), [])
        documents.append([*data.tokenizer.encode(document.text), special.eos])
    assert {key[1:] for key in expected} == {("pydoc", "en"), ("documents.jsonl", "zh")}
    found = {(split, s.source, s.language): s for split, shards in data.shards.items() for s in shards}
    assert found.keys() == expected.keys()
    for key, documents in expected.items():
        shard = found[key]
        assert shard.stream.tolist() == [token for document in documents for token in document]
        assert np.diff(shard.offsets).tolist() == [len(document) for document in documents]


@pytest.fixture
def own_shards(data_folder, tmp_path):
    import shutil

    return shutil.copytree(data_folder, tmp_path / "shards")


@pytest.mark.parametrize("name", ["train-00000.tokens", "train-00000.offsets", "heldout-00000.tokens"])
def test_cut_and_missing_shards_are_found_on_opening(own_shards, name):
    file = own_shards / name
    os.truncate(file, file.stat().st_size - 2)
    with pytest.raises(InputError, match=f"{name} has .* bytes of"):
        open_data(own_shards)
    file.unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        open_data(own_shards)


def test_altered_shards_are_found_on_reading(own_shards):
    with (own_shards / "train-00000.tokens").open("r+b") as file:
        file.seek(100)
        file.write(b"\xff\xff")
    with pytest.raises(InputError, match="does not match its checksum"):
        _ = open_data(own_shards).shards["train"][0].stream


def test_another_tokenizer_is_found(own_shards):
    with (own_shards / "tokenizer.model").open("ab") as file:
        file.write(b"\x00")
    with pytest.raises(InputError, match=r"tokenizer\.model"):
        open_data(own_shards)


def test_what_is_no_data_folder(tmp_path, data_folder):
    with pytest.raises(InputError, match=r"not a finished shards: it has no meta\.json"):
        open_data(tmp_path)
    with pytest.raises(InputError, match="it holds something else"):
        open_data(data_folder.parent / "corpus")
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        open_data(tmp_path)


def test_everything_held_out_is_refused(data_folder, tmp_path):
    base = data_folder.parent
    build_corpus(
        (write(tmp_path / "a.jsonl", [{"text": "one text", "group": "g"}]),), tmp_path / "corpus", None
    )
    with pytest.raises(InputError, match="lower --heldout"):
        build_shards(tmp_path / "corpus", base / "tokenizer", tmp_path / "shards", 0.999999999, 1)


MODELS = '''
class Thing(AbstractModel):
    r"""A thing &lt;b&gt; <b>bold</b>
    """

    def __init__(self):
        r"""
        :param _Name: 名称，不超过60个字符
        :type Name: str
        :param _Id: 唯一标识
        :type Id: str
        """


class ThingResponse(AbstractModel):
    """Thing返回参数结构体

    """

    def __init__(self):
        """
        :param _Id: 唯一标识
        :type Id: str
        """
'''
CLIENT = '''
class ThingClient(AbstractClient):
    def DescribeThing(self, request):
        r"""Describes one thing.

        :param request: Request instance
        """
'''


def test_documentation_is_read_out_of_a_wheel_without_running_it(tmp_path):
    wheel = tmp_path / "tencentcloud_sdk_python-3.1.195-py2.py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tencentcloud/cvm/v1/models.py", "raise SystemExit('run!')\n" + MODELS)
        archive.writestr("tencentcloud/cvm/v1/cvm_client.py", CLIENT)
    documents = list(packages.tencent_documents(wheel, "zh"))
    assert sorted(d.text for d in documents) == [
        "DescribeThing: Describes one thing.",
        "Thing: A thing <b> bold\nName: 名称，不超过60个字符\nId: 唯一标识",
    ]
    assert {d.group for d in documents} == {"tencent/cvm"}


def test_botocore_documentation(tmp_path):
    long = "<p>" + "What this operation does in some detail. " * 4 + "</p>"
    model = {
        "operations": {
            "A": {"documentation": long},
            "B": {"documentation": "short"},
            "C": {"documentation": long},
        }
    }
    wheel = tmp_path / "botocore-1.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            "botocore/data/ec2/2016/service-2.json.gz", gzip.compress(json.dumps(model).encode())
        )
    (document,) = packages.botocore_documents(wheel)
    assert document.text == ("What this operation does in some detail. " * 4).strip()
    assert document.group == "aws/ec2"


def test_no_index_is_one_clear_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert main(["corpus", "--out", str(tmp_path / "corpus")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot download tencentcloud-sdk-python" in said
    assert "give files of your own" in said
