"""Makes the files beside it with the reference compressors: pip install brotli zstandard.

An answer whole, a stream flushed after each event, and bodies that expand very far.
"""

import gzip
import io
import pathlib
import zlib

import brotli
import zstandard

HERE = pathlib.Path(__file__).parent
CAPTURES = HERE.parent / "captures" / "vllm"
BOMB = b'{"usage":' + b" " * (64 << 20)


def body(name):
    raw = (CAPTURES / name).read_bytes()
    return raw.split(b"\r\n\r\n" if b"\r\n\r\n" in raw else b"\n\n", 1)[1]


def flushed_gzip(events):
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", mtime=0) as file:
        for event in events:
            file.write(event)
            file.flush()
    return out.getvalue()


def flushed_deflate(events):
    coder = zlib.compressobj()
    return b"".join(coder.compress(event) + coder.flush(zlib.Z_SYNC_FLUSH) for event in events) + coder.flush()


def flushed_brotli(events):
    coder = brotli.Compressor(quality=5)
    return b"".join(coder.process(event) + coder.flush() for event in events) + coder.finish()


def flushed_zstd(events):
    coder = zstandard.ZstdCompressor(level=3, write_checksum=True).compressobj()
    flush = zstandard.COMPRESSOBJ_FLUSH_BLOCK
    return b"".join(coder.compress(event) + coder.flush(flush) for event in events) + coder.flush()


answer = body("chat.http")
stream = body("chat_stream_usage.http")
events = [event + b"\n\n" for event in stream.split(b"\n\n") if event]
for name, parts in [("answer.json", [answer]), ("stream.sse", events)]:
    (HERE / name).write_bytes(b"".join(parts))
    for suffix, code in [("gz", flushed_gzip), ("deflate", flushed_deflate), ("br", flushed_brotli), ("zst", flushed_zstd)]:
        (HERE / f"{name}.{suffix}").write_bytes(code(parts))
(HERE / "bomb.br").write_bytes(brotli.compress(BOMB))
(HERE / "bomb.zst").write_bytes(zstandard.ZstdCompressor(level=19).compress(BOMB))
