// include_cpp.cc - the implementation as C++: it compiles, and C++ code can use every type.
#define BALANCEKV_IMPLEMENTATION
#include "balancekv.h"

namespace {

alignas(64) unsigned char block[BKV_SIZE(1, 1, 32, 256, BKV_F16)];

struct Stream {
    bkv_cache cache;
    explicit Stream(const bkv_config &cfg) : cache()
    {
        ok = bkv_init(&cache, &cfg, block, sizeof block) == BKV_OK;
    }
    void step(const float *x, float *out)
    {
        const bkv_tensor tensor = bkv_dense(x, BKV_F32);
        ok = ok && bkv_append(&cache, tensor, tensor, 1, 0, 0, 1) == BKV_OK &&
             bkv_attend(&cache, tensor, out, 0, 1) == BKV_OK;
    }
    bool ok;
};

} // namespace

int main()
{
    bkv_config cfg = bkv_config(); // all zero: every default
    cfg.n_kv_heads = 1;
    cfg.head_dim = 32;
    cfg.budget = 256;
    Stream stream(cfg);
    float x[32], out[32] = {};
    for (int t = 0; t < 400; t++) {
        for (int i = 0; i < 32; i++)
            x[i] = static_cast<float>((t * 7 + i * i * 5) % 31) / 31.0f;
        stream.step(x, out);
    }
    const bkv_token_info first = [&] {
        bkv_token_info info = bkv_token_info();
        stream.ok = stream.ok && bkv_token(&stream.cache, 0, 0, &info) == BKV_OK;
        return info;
    }();
    // Values lie in [0, 1], and so must their average.
    return !(stream.ok && first.kind == BKV_KIND_SINK && out[5] > 0.0f && out[5] < 1.0f);
}
