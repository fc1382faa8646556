"""balancekv.h from Python: NumPy arrays in, NumPy arrays out.

    sh examples/python/build.sh          # once: the shared library

    import numpy as np, balancekv
    cache = balancekv.Cache(n_q_heads=9, n_kv_heads=3, head_dim=64, budget=512)
    cache.append(k, v)                   # [n_tokens, n_kv_heads, head_dim], float32 or float16
    out = cache.attend(q)                # q: [n_q_heads, head_dim]; out: the same shape, float32
    out = cache.prefill(k, v, q)         # q: [n_tokens, n_q_heads, head_dim]: causal attention

What the words mean, and every field of the configuration: section 1 and 3 of balancekv.h. The
structures and constants below are read out of that file, so that they cannot differ from it.
"""
import ctypes
import operator
import os
import re
from types import SimpleNamespace

import numpy as np

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_LIBRARY = os.environ.get("BALANCEKV_LIBRARY", os.path.join(_ROOT, "build/python/libbalancekv.so"))
_TYPES = {"uint32_t": ctypes.c_uint32, "uint64_t": ctypes.c_uint64, "size_t": ctypes.c_size_t,
          "float": ctypes.c_float}


# ---- what the header says ------------------------------------------------------------------------
def _read_header():
    """The structures and constants of section 3, without their prefix: types.config, C.F16 .."""
    with open(os.path.join(_ROOT, "balancekv.h"), encoding="utf-8") as file:
        text = re.sub(r"/\*.*?\*/", "", file.read(), flags=re.S)
    types = {}
    for name, body in re.findall(r"typedef struct (bkv_\w+) \{(.*?)\} \1;", text, re.S):
        fields = []
        for declaration in filter(None, map(str.strip, body.split(";"))):
            kind, names = re.fullmatch(r"(?:const |unsigned )?(\w+)\s+(.*)", declaration,
                                       re.S).groups()
            for pointer, field, length in re.findall(r"(\*?)(\w+)(?:\[(\d+)\])?", names):
                member = ctypes.c_void_p if pointer else {**_TYPES, **types}[kind]
                fields.append((field, member * int(length) if length else member))
        types[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    numbers = dict(re.findall(r"#define BALANCEKV_(\w+) (\d+)\n", text))
    numbers["NONE"] = re.search(r"#define BKV_NONE (\w+)u", text)[1]
    for body in re.findall(r"enum \{(.*?)\}", text, re.S):
        numbers.update(re.findall(r"BKV_(\w+) = (\d+)", body))
    return (SimpleNamespace(**{name[4:]: kind for name, kind in types.items()}),
            SimpleNamespace(**{name: int(number, 0) for name, number in numbers.items()}))


types, C = _read_header()
_WORDS = {"kv_type": {"f32": C.F32, "f16": C.F16, "bf16": C.BF16, "i8": C.I8,
                      "i4": C.I4},
          "rule": {"sample": C.RULE_SAMPLE, "window": C.RULE_WINDOW},
          "importance": {"key": C.IMPORTANCE_KEY, "query": C.IMPORTANCE_QUERY,
                         "use": C.IMPORTANCE_USE}}


def _load():
    try:
        lib = ctypes.CDLL(_LIBRARY)
    except OSError as fault:
        raise ImportError("%s is not there or not a library: run examples/python/build.sh, or set "
                          "BALANCEKV_LIBRARY (%s)" % (_LIBRARY, fault)) from fault
    cache, size, u32 = ctypes.POINTER(types.cache), ctypes.c_size_t, ctypes.c_uint32
    config, tensor, pointer = ctypes.POINTER(types.config), types.tensor, ctypes.c_void_p
    share = [u32, u32, u32]  # flags, ith, nth
    for name, result, arguments in (
            ("check", ctypes.c_int, [config]), ("size", size, [config]),
            ("init", ctypes.c_int, [cache, config, pointer, size]),
            ("reset", ctypes.c_int, [cache]),
            ("truncate", ctypes.c_int, [cache, ctypes.c_uint64]),
            ("shrink", ctypes.c_int, [cache, u32]),
            ("save", ctypes.c_int, [cache, pointer, size]),
            ("load_size", size, [ctypes.c_char_p, size, u32]),
            ("load", ctypes.c_int, [cache, ctypes.c_char_p, size, pointer, size, u32, u32]),
            ("append", ctypes.c_int, [cache, tensor, tensor, size] + share),
            ("attend", ctypes.c_int, [cache, tensor, pointer, u32, u32]),
            ("prefill", ctypes.c_int, [cache, tensor, tensor, tensor, pointer, size] + share),
            ("token", ctypes.c_int, [cache, u32, u32, ctypes.POINTER(types.token_info)]),
            ("export", ctypes.c_int, [cache, u32, ctypes.POINTER(types.rows)]),
            ("stats", ctypes.c_int, [cache, ctypes.POINTER(types.stats_info)]),
            ("result_string", ctypes.c_char_p, [ctypes.c_int]),
            ("version", ctypes.c_char_p, [])):
        function = getattr(lib, "bkv_" + name)
        function.restype, function.argtypes = result, arguments
    return lib


_lib = _load()
version = _lib.bkv_version().decode()


class Error(ValueError):
    """What the library itself refuses, in its words; the cache is then unchanged."""


def _must(result):
    if result:
        raise Error(_lib.bkv_result_string(result).decode())


# ---- numbers -------------------------------------------------------------------------------------
def _number(name, value, kind):
    """The value as a number that a C variable of this kind holds; ctypes itself would wrap it."""
    whole = kind is not ctypes.c_float
    try:
        number = operator.index(value) if whole else kind(value).value
    except TypeError as fault:
        need = "whole number" if whole else "number"
        raise TypeError("%s: %r, need a %s" % (name, value, need)) from fault
    if whole and not 0 <= number < 1 << 8 * ctypes.sizeof(kind):
        raise ValueError("%s: %s is out of range" % (name, number))
    return number


# ---- arrays --------------------------------------------------------------------------------------
def _tensor(array, name, n_heads, dim, n_tokens=None):
    """The array as bkv_tensor, and how many tokens it has. Strided arrays are read where they lie;
    what is returned last must live as long as the tensor."""
    if not isinstance(array, np.ndarray):
        raise TypeError("%s: %s, need a NumPy array" % (name, type(array).__name__))
    if array.dtype not in (np.float32, np.float16):
        raise TypeError("%s: dtype %s, need float32 or float16" % (name, array.dtype))
    rows = array[None] if array.ndim == 2 else array
    if rows.ndim != 3 or rows.shape[1:] != (n_heads, dim) or \
            n_tokens is not None and len(rows) != n_tokens:
        wanted = "n_tokens" if n_tokens is None else n_tokens
        raise ValueError("%s: shape %s, need (%s, %d, %d)%s" % (
            name, array.shape, wanted, n_heads, dim,
            " or (%d, %d)" % (n_heads, dim) if n_tokens in (None, 1) else ""))
    strides = rows.strides
    if rows.flags.c_contiguous or min(strides) <= 0 or 1 in rows.shape:
        rows, strides = np.ascontiguousarray(rows), (0, 0, 0)
    kind = C.F32 if rows.dtype == np.float32 else C.F16
    return types.tensor(rows.ctypes.data, kind, *strides), len(rows), rows


# ---- the cache -----------------------------------------------------------------------------------
class Cache:
    """One transformer layer. Further arguments are fields of bkv_config by their names, such as
    window=256, seed=layer or backend=C.BACKEND_SCALAR; kv_type, rule and importance may also be
    words as "f16", "window" and "key"."""

    def __init__(self, n_q_heads, n_kv_heads, head_dim, budget, **fields):
        fields.update(n_q_heads=n_q_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, budget=budget)
        config, known = types.config(), dict(types.config._fields_)
        for name, value in fields.items():
            if name not in known:
                raise TypeError("no field %s in bkv_config; it has %s" % (name, ", ".join(known)))
            if name in _WORDS and isinstance(value, str):
                if value not in _WORDS[name]:
                    words = ", ".join(_WORDS[name])
                    raise ValueError("%s: %r is none of %s" % (name, value, words))
                value = _WORDS[name][value]
            setattr(config, name, _number(name, value, known[name]))
        _must(_lib.bkv_check(config))
        self._cache = types.cache()
        self._memory = np.empty(_lib.bkv_size(config), np.uint8)
        _must(_lib.bkv_init(self._cache, config, self._memory.ctypes.data, self._memory.size))

    @property
    def config(self):
        """A dict of bkv_config, every default filled in."""
        return _dict(self._cache.cfg)

    def append(self, k, v, pin=False):
        """Appends k [n, n_kv_heads, head_dim] and v [n, n_kv_heads, value_dim]; of one token also
        without the n. Pinned tokens stay in every halving (BKV_PIN)."""
        k, n, keep_k = self._keys(k)
        v, n, keep_v = self._values(v, n)
        _must(_lib.bkv_append(self._cache, k, v, n, C.PIN if pin else 0, 0, 1))
        del keep_k, keep_v

    def attend(self, q):
        """Attention of one position: q [n_q_heads, head_dim]; float32 [n_q_heads, value_dim]."""
        q, _, keep = self._queries(q, 1)
        out = self._out(1)[0]
        _must(_lib.bkv_attend(self._cache, q, out.ctypes.data, 0, 1))
        del keep
        return out

    def prefill(self, k, v, q, pin=False):
        """Appends a chunk and attends causally: float32 [n, n_q_heads, value_dim]."""
        k, n, keep_k = self._keys(k)
        v, n, keep_v = self._values(v, n)
        q, n, keep_q = self._queries(q, n)
        out = self._out(n)
        _must(_lib.bkv_prefill(self._cache, k, v, q, out.ctypes.data, n, C.PIN if pin else 0, 0,
                               1))
        del keep_k, keep_v, keep_q
        return out

    def tokens(self, head):
        """The kept tokens of a KV head, oldest first: a structured array of bkv_token_info."""
        head, info, rows = _number("head", head, ctypes.c_uint32), types.token_info(), []
        for i in range(self.stats()["tokens_held"]):
            _must(_lib.bkv_token(self._cache, head, i, info))
            rows.append(tuple(_dict(info).values()))
        return np.array(rows, dtype=[(name, np.dtype(kind))
                                     for name, kind in types.token_info._fields_])

    def rows(self, head):
        """What attention reads of a KV head: keys [n, head_dim], values [n, value_dim] as halvings
        have moved them, and the logarithms of the weights [n], to be added to the scaled logits;
        all float32. In the order of the slots, which is not that of tokens()."""
        head, config = _number("head", head, ctypes.c_uint32), self._cache.cfg
        slots = self.stats()["slots"]
        k, v, log_weight = (np.empty(shape, np.float32) for shape in (
            (slots, config.head_dim), (slots, config.value_dim), slots))
        _must(_lib.bkv_export(self._cache, head, types.rows(
            k=k.ctypes.data, v=v.ctypes.data, mask=log_weight.ctypes.data, type=C.F32,
            mask_type=C.F32, n_rows=slots)))
        used = log_weight > -np.inf
        return k[used], v[used], log_weight[used]

    def stats(self):
        """A dict of bkv_stats_info."""
        info = types.stats_info()
        _must(_lib.bkv_stats(self._cache, info))
        return _dict(info)

    def reset(self):
        """Empties the cache."""
        _must(_lib.bkv_reset(self._cache))

    def truncate(self, n_tokens):
        """Takes back all but the first n_tokens, as far back as the last halving."""
        _must(_lib.bkv_truncate(self._cache, _number("n_tokens", n_tokens, ctypes.c_uint64)))

    def shrink(self, budget):
        """Lowers the budget in place."""
        _must(_lib.bkv_shrink(self._cache, _number("budget", budget, ctypes.c_uint32)))

    def save(self):
        """The state as bytes, the same on every machine."""
        saved = np.empty(self.stats()["state_bytes"], np.uint8)
        _must(_lib.bkv_save(self._cache, saved.ctypes.data, saved.size))
        return saved.tobytes()

    @classmethod
    def load(cls, saved):
        """A cache that goes on where the saved one was. The bytes may come from anywhere."""
        if not isinstance(saved, bytes):
            raise TypeError("saved: %s, need bytes" % type(saved).__name__)
        made = object.__new__(cls)
        made._cache = types.cache()
        made._memory = np.empty(_lib.bkv_load_size(saved, len(saved), 1), np.uint8)
        _must(_lib.bkv_load(made._cache, saved, len(saved), made._memory.ctypes.data,
                            made._memory.size, 1, C.BACKEND_AUTO))
        return made

    def copy(self):
        """A second cache in the same state, for instance to try two continuations."""
        return self.load(self.save())

    def _keys(self, k):
        return _tensor(k, "k", self._cache.cfg.n_kv_heads, self._cache.cfg.head_dim)

    def _values(self, v, n):
        return _tensor(v, "v", self._cache.cfg.n_kv_heads, self._cache.cfg.value_dim, n)

    def _queries(self, q, n):
        return _tensor(q, "q", self._cache.cfg.n_q_heads, self._cache.cfg.head_dim, n)

    def _out(self, n):
        return np.empty((n, self._cache.cfg.n_q_heads, self._cache.cfg.value_dim), np.float32)


def _dict(structure):
    return {name: getattr(structure, name) for name, _ in structure._fields_}
