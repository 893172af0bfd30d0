"""What hostile requests say: values, media types, targets, methods and names that no client should send."""

JSON = "application/json"
BOUNDARY = b"boundary-of-parts"
FORM = f"multipart/form-data; boundary={BOUNDARY.decode()}"

VALUES = (  # JSON, or what takes itself for it
    *(
        "null",
        "true",
        "false",
        "0",
        "-1",
        "1.5",
        "-0.0",
        "1e-300",
        "1e400",
        "NaN",
        "-Infinity",
        "[]",
        "{}",
        '""',
        '"x"',
    ),
    *(
        '"16x16"',
        '"0x0"',
        '"99999x99999"',
        '"1e3x16"',
        '"\\u0000"',
        '"\\ud800"',
        '"\\udfff\\ud800"',
        "'x'",
        "0x10",
        "01",
    ),
    *(
        "1" + "0" * 400,
        "-" + "9" * 5000,
        "0." + "3" * 5000,
        "9223372036854775808",
        "[null]",
        '{"a": {"b": []}}',
        "[[[1]]]",
    ),
    *('"' + "a" * 40_000 + '"', '"\\r\\n\\u001b[31m"', '"\u202e"', '"auto"', '"transparent"', "[1, 2, 3]", "tru", ""),
)
TYPES = (
    *(
        "",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        'multipart/form-data; boundary="',
        "multipart/mixed",
    ),
    *(
        "multipart/form-data; boundary=" + "b" * 300,
        "multipart/form-data; boundary=\xff\xfe",
        "text/plain; charset=utf-7",
    ),
    *(
        "multipart/form-data; boundary*=utf-8''%00%ff",
        "MULTIPART/FORM-DATA; BOUNDARY=b; boundary=c",
        ";;;;",
        "a" * 5000,
    ),
    *("multipart/form-data; " + "x=y; " * 2000 + "boundary=b", 'multipart/form-data; boundary="a\\"b"', JSON, FORM),
)
TARGETS = (
    *(
        "/",
        "*",
        "//",
        "/%00",
        "/%zz",
        "/%ff%fe",
        "/..%2f..%2fetc%2fpasswd",
        "/../../etc/passwd",
        "/v1/files/..%2f..%2fx",
    ),
    *("/v1/models/%0d%0aX-Injected:%201", "/v1/models/" + "a" * 3000, "/v1/videos/..%2f", "/v1/videos/%00/content"),
    *("http://elsewhere/health", "/health?" + "a=b&" * 3000, "/v1/videos?limit=" + "9" * 400, "/v1/videos?after=%00"),
    *(
        "/v1/videos?order=%ff&limit=-1",
        "/v1/files/%2e%2e",
        "/health;x=y",
        "/health#x",
        "/metrics?x[]=y",
        "/v1/%76ideos",
    ),
)
METHODS = ("GET", "POST", "PUT", "HEAD", "DELETE", "OPTIONS", "PATCH", "TRACE", "get", "X" * 300, "PRI", "A'b")
IDS = (
    "",
    "a" * 129,
    "a" * 128,
    "\t",
    "\x7f",
    "caf\xe9",
    "\xff" * 50,
    'a" b="c',
    "%0d%0aSet-Cookie:x=y",
    "; ".join("abc"),
)
