"""Files that nobody sends who means well."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib

from PIL import Image
from tests.pictures import bombs, chunk, file, frames, image, png

MIB = 1 << 20
_PACKED = zlib.compress(bytes(MIB), 9)  # a kilobyte
_JPEG, _PNG, _WEBP = (file(image(size=(512, 512)), kind) for kind in ("JPEG", "PNG", "WEBP"))


def _zip() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../etc/passwd", bytes(10 * MIB))
    return data.getvalue()


def _flooded(data: bytes, part: bytes, at: int, more: int = MIB) -> bytes:
    return data[:at] + more // len(part) * part + data[at:]


# What is refused.
REFUSED: dict[str, bytes] = {
    **{f"{kind} of 60,000 pixels a side": data for kind, data in bombs(60_000).items() if kind != "WEBP"},
    **{f"{kind} of 16,000 pixels a side": data for kind, data in bombs(16_000).items()},
    "PNG of as many pixels as may be, with none of them": png((4096, 4096), 16, 6, bytes(1000)),
    "PNG whose pixels go on": png((1 << 14, 1 << 14), 1, 0, bytes(40 * MIB)),
    "APNG": frames("PNG"),
    "animated WebP": frames("WEBP"),
    "GIF": frames("GIF"),
    "TIFF": file(image(), "TIFF"),
    "BMP": file(image(), "BMP"),
    "ICO": file(image(size=(32, 32)), "ICO"),
    "PSD": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 30_000, 30_000, 8, 3) + bytes(100),
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n%%EOF",
    "FITS": b"SIMPLE  =                    T".ljust(80) + b"NAXIS   =                    2".ljust(2800),
    "PDF": b"%PDF-1.7\n1 0 obj<</Type/Catalog/OpenAction<</S/URI/URI(http://127.0.0.1/)>>>>endobj",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://127.0.0.1/a.png"/></svg>',
    "AVIF": struct.pack(">I", 28) + b"ftypavif" + bytes(100),
    "zip": _zip(),
    "gzip": b"\x1f\x8b\x08" + _PACKED,
    "an address": b"http://127.0.0.1/a.png",
    "nothing": b"",
    **{f"half a {name}": data[: len(data) // 2] for name, data in (("JPEG", _JPEG), ("PNG", _PNG), ("WebP", _WEBP))},
    "PNG with a wrong sum": _PNG[:20] + b"\1" + _PNG[21:],
    "PNG with wrong data": _PNG[:-40] + bytes(24) + _PNG[-16:],
    "JPEG with 1,000 scans": _JPEG[:-2] + 1000 * b"\xff\xda\0\x02" + _JPEG[-2:],
    "PNG with 87,000 chunks": _flooded(_PNG, chunk(b"IDAT", b""), 33),
    "JPEG with 260,000 markers": _flooded(_JPEG, b"\xff\xe5\0\x02", 2),
    "JPEG with 1 MiB of tables": _flooded(_JPEG, b"\xff\xdb\xff\xff" + bytes(65533), 2),
}

# What is read, and what would become of it unpacked is not.
HARMLESS: dict[str, bytes] = {
    "PNG with texts of 60 MiB": png(
        (8, 8), 8, 0, bytes(72), *(chunk(b"zTXt", b"a%d\0\0" % number + _PACKED) for number in range(60))
    ),
    "PNG with international texts of 60 MiB": png(
        (8, 8), 8, 0, bytes(72), *(chunk(b"iTXt", b"a%d\0\1\0\0\0" % number + _PACKED) for number in range(60))
    ),
    "PNG with a profile of 100 MiB": png(
        (8, 8), 8, 0, bytes(72), chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(100 * MIB), 9))
    ),
    "JPEG with profiles of 2 MiB": _flooded(_JPEG, b"\xff\xe2\xff\xffICC_PROFILE\0\1\1" + bytes(65519), 2, 2 * MIB),
    "JPEG with 1 MiB of fill bytes": _flooded(_JPEG, b"\xff", 2),
    "JPEG with a zip behind it": file(Image.new("RGB", (64, 64)), "JPEG") + _zip(),
}
