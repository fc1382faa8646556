#!/usr/bin/env python3
"""Do the tests notice? Breaks copies of balancekv.h in many small ways, one at a time, and shows
for each that a test goes red.

    mutate.py [--only NAME,..] [--jobs N] the mutations whose name contains a NAME; a table
    mutate.py --markdown                  their rows of tests/MUTATIONS.md anew, too
    mutate.py --check                     only: does every old text occur exactly once? (fast)

A mutation names the tests that should catch it, the one that is meant to first. "trust:shrinks"
are the tests of test_trust.c with "shrinks" in their names, "hash" is bench/hash.c; behind an @
stands the build (BUILDS), which is `scalar` if there is none. Only red counts: a mutation that does
not compile fails here, and so does a test that is red on the unbroken header, too.
"""
import argparse
import datetime
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

from bad_config import ROOT, Tally, on_x86

CROSS, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
TIMEOUT = 900  # seconds of one test; a mutation may well make it endless

Mutation = namedtuple("Mutation", "name old new tests")
M = Mutation

MUTATIONS = [
    # ---- sizes and constants
    M("size-macro-words", "12 * (slots) +", "8 * (slots) +", ["api:constant_sizes"]),
    M("size-macro-rests", "((slots)-16) / 256 : 4)", "((slots)-16) / 128 : 4)",
      ["api:constant_sizes"]),
    M("fewer-pins", "BKVI_PINS = 32,", "BKVI_PINS = 31,", ["stream:pinned"]),
    M("few-are-fewer", "BKVI_FEW = 512,", "BKVI_FEW = 496,", ["api:defaults"]),
    M("learns-faster", "BKVI_LEARN = 0.01f", "BKVI_LEARN = 0.02f", ["golden:f32"]),

    # ---- numbers
    M("high-word-lost", "(uint64_t)bkvi_get32(p) | (uint64_t)bkvi_get32(p + 4) << 32",
      "(uint64_t)bkvi_get32(p)", ["stream:positions"]),
    M("heads-draw-alike", "BKVI_GOLDEN * ((uint64_t)head + 1)", "BKVI_GOLDEN * (0 * head + 1)",
      ["stream:seeds"]),
    M("seed-ignored", "bkvi_mix(bkvi_mix(seed +", "bkvi_mix(bkvi_mix(0 * seed +", ["stream:seeds"]),
    M("half-the-numbers", ">> 40) * 5.9604644775390625e-8f;", ">> 40) * 2.98023223876953e-8f;",
      ["stream:weights_on_average"]),
    M("bf16-ties-up", "(u + 0x7FFFu + (u >> 16 & 1u))", "(u + 0x8000u)", ["convert:values"]),
    M("f16-ties-up", "rest += 0xFFFu + (rest >> 13 & 1u);", "rest += 0x1000u;",
      ["convert:values"]),
    M("root-early", "for (i = 0; i < 5; i++) y = 0.5", "for (i = 0; i < 2; i++) y = 0.5",
      ["api:default_scales", "kernels@all", "hash"]),
    M("fma-rounds-twice", "(p - (sum - back)) + ((double)c - back);",
      "0.0 * back;", ["hash@soft"]),

    # ---- dispatch
    M("any-backend-granted", "return have >> wanted & 1 ? wanted : 0;", "return wanted;",
      ["api:configs"]),
    M("auto-takes-the-slowest", "for (b = BKV_BACKEND_NEON; b > 0 && !(have >> b & 1);) b--;",
      "for (b = 1; b < BKV_BACKEND_NEON && !(have >> b & 1);) b++;", ["api:attach_backends@all"]),
    M("wrong-kernels", "return bkvi_kernels_avx2();", "return bkvi_kernels_scalar();",
      ["kernels@all"]),

    # ---- halving
    M("certain-not-counted", "(double)(BKVI_PAGE - before) / sum", "(double)BKVI_PAGE / sum",
      ["golden:f32"]),
    M("draw-biased", "u * bkvi_least(sum, 2.0f - sum)", "u * bkvi_least(sum, 1.0f)",
      ["stream:weights_on_average"]),
    M("weight-not-raised", "(block->chance[i] + (float)!keep[i])", "(1.0f + (float)!keep[i])",
      ["stream:weights_on_average"]),
    M("mass-not-capped", "kept > (double)h->seen; i++", "kept < 0.0; i++",
      ["stream:any_importance", "stream:state_at", "hash"]),
    M("window-keeps-old", "keep[i] = i >= BKVI_PAGE;", "keep[i] = i < BKVI_PAGE;",
      ["stream:state_at"]),
    M("pins-have-no-chance", "chance[i] = pinned[i], certain += pinned[i];", "chance[i] = 0.0f;",
      ["stream:pinned"]),

    # ---- stream
    M("use-left-behind",
      "memcpy(bkvi_part(h, BKVI_USE, to), bkvi_part(h, BKVI_USE, from), 4);", ";",
      ["stream:certain"]),
    M("scale-left-behind",
      "memcpy(bkvi_part(h, i, to), bkvi_part(h, i, from), 2);", ";",
      ["attend:extremes", "attend:errors"]),
    M("rest-of-wrong-lane", "lane * (part == BKVI_K ? h->c->elem_bytes : 1);",
      "(part == BKVI_K ? lane * h->c->elem_bytes : lane ^ 1);", ["attend:exact", "hash"]),
    M("use-not-cleared", "BKVI_WEIGHT,  BKVI_USE,     BKVI_POSITION,", "BKVI_WEIGHT, BKVI_POSITION,",
      ["trust:shrinks"]),
    M("pin-outlives-weight", "bkvi_weight(h, slot) <= 1.0f;", "bkvi_weight(h, slot) <= 100.0f;", ["stream:pinned"]),
    M("window-halved", "bkvi_halve(h, c->n_pages - c->window_pages);", "bkvi_halve(h, c->n_pages);",
      ["stream:state_at"]),
    M("youngest-pair", "if (level < best_level) best = i,", "if (level <= best_level) best = i,",
      ["stream:state_at"]),
    M("full-of-pins-no-matter", "level += pins > BKVI_PINS ? 1u << 31 : 0;",
      "level += 0 * pins;", ["stream:pinned"]),
    M("lost-pin-still-marks", "if (block->use[i] >= BKVI_PINNED) block->use[i] = 0.0f;", ";",
      ["stream:pinned", "golden:f32", "hash"]),
    M("level-not-in-sum", "h->sum += bkvi_sum(h, slots[0], BKVI_PAGE) + level;",
      "h->sum += bkvi_sum(h, slots[0], BKVI_PAGE);", ["trust:validation"]),
    M("window-has-levels", "(h->c->cfg.rule == BKV_RULE_WINDOW ? 0 : 1);", "1;", ["stream:state_at"]),
    M("run-crosses-a-block",
      "return bkvi_min(BKVI_PAGE - h->sinks % BKVI_PAGE, c->sink_slots - h->sinks);",
      "return c->sink_slots - h->sinks;", ["stream:ways", "stream:many_sinks"]),
    M("position-of-the-run", "BKVI_POSITION, slot), (uint32_t)(h->seen + t));",
      "BKVI_POSITION, slot), (uint32_t)h->seen);", ["stream:ways"]),
    M("draft-pins", "flags & BKV_PIN ? BKVI_PINNED", "flags & BKV_DRAFT ? BKVI_PINNED",
      ["stream:pinned"]),

    # ---- which slots attention sees
    M("sink-block-fill", "(h->sinks - 1) % BKVI_PAGE + 1;", "h->sinks % BKVI_PAGE;",
      ["stream:ways", "stream:many_sinks"]),
    M("old-page-twice", "b += b >= bkvi_min(newest, second);", ";", ["attend:weighted"]),
    M("rests-of-all-sinks", "slot < c->sink_slots ? BKVI_LANES : BKVI_PAGE);", "BKVI_PAGE);",
      ["attend:exact", "hash"]),

    # ---- checks of arguments
    M("window-without-pages", "if (pages < window + 2)", "if (pages < window + 1)",
      ["api:budgets"]),
    M("wide-default-window", "r->budget / 4 / BKVI_PAGE", "r->budget / 3 / BKVI_PAGE",
      ["api:defaults", "golden:f32"]),
    M("group-of-17", "r->n_q_heads / r->n_kv_heads > 16", "r->n_q_heads / r->n_kv_heads > 17",
      ["api:configs"]),
    M("nan-softcap", "(r->softcap >= 1.0f && r->softcap <= 100.0f)",
      "!(r->softcap < 1.0f || r->softcap > 100.0f)", ["api:configs"]),
    M("softcap-of-a-half", "r->softcap >= 1.0f", "r->softcap >= 0.5f", ["api:configs"]),
    M("memory-not-checked",
      "if (mem_bytes < made.bytes) return BKV_E_MEMORY;\n    made.mem = (unsigned char *)mem;\n"
      "    *c = made;",
      "made.mem = (unsigned char *)mem;\n    *c = made;", ["api:memory_too_small"]),
    M("dense-token-stride", "t->token_stride = n_heads * t->head_stride;",
      "t->token_stride = t->head_stride;", ["attend:exact"]),
    M("overlap-accepted", "if (steps[i] && stride[i] < extent) return BKV_E_STRIDE;", ";",
      ["api:tensors"]),
    M("share-not-checked", "if (ith >= nth || nth >", "if (nth >", ["api:counts"]),
    M("flags-not-checked", "if (flags & ~(uint32_t)(BKV_PIN | BKV_DRAFT)) return BKV_E_FLAGS;", ";",
      ["api:counts"]),
    M("too-large-for-f16",
      "limit = i < 2 && c->cfg.kv_type == BKV_F16 ? 65520.0f : BKVI_HUGE;", "limit = BKVI_HUGE;", ["api:bad_values"]),
    M("empty-not-checked", "if (!k && bkvi_get64(bkvi_head_mem(c, 0)) == 0) return BKV_E_EMPTY;",
      ";", ["api:counts"]),

    # ---- checks of states
    M("header-rest-ignored", "if (mem[i]) return BKV_E_STATE;", ";", ["api:attach_damaged"]),
    M("byte-order-ignored", "if (magic != BKVI_MAGIC && magic != BKVI_MAGIC_SWAPPED) return",
      "if (magic != BKVI_MAGIC) return", ["api:attach_foreign"]),
    M("a-page-twice", "if (taken[bit / 8] >> bit % 8 & 1) return 0;", ";",
      ["api:attach_twofold"]),
    M("heads-may-differ", "return bkvi_same(h.mem, bkvi_head_mem(c, 0), BKVI_COUNTER_BYTES);",
      "return 1;", ["api:attach_uneven"]),

    # ---- drafts, rolling back, shrinking
    M("drafts-never-accepted", "bkvi_min(h.drafts, 1u << 30) + run.n : 0;",
      "bkvi_min(h.drafts, 1u << 30) + run.n : h.drafts;", ["trust:drafts_teach"]),
    M("drafts-teach-means", "h->drafts ? NULL : bkvi_part(h, BKVI_QUERIES,", "bkvi_part(h, BKVI_QUERIES,",
      ["trust:rejected"]),
    M("drafts-teach-use", "b + 2 < n_blocks || h->drafts ? NULL", "b + 2 < n_blocks ? NULL",
      ["trust:rejected"]),
    M("no-draft-remains", "h->drafts = h->drafts > n ? h->drafts - n : 0;", "h->drafts = 0;",
      ["trust:rejected"]),
    M("sum-not-taken-back", "h->sum -= bkvi_sum(h, slot, 1);", ";", ["trust:rollback"]),
    M("rest-not-taken-back", "(uint32_t)h->c->each[i - BKVI_K + BKVI_K_REST], 1);", "0, 1);",
      ["trust:rejected"]),
    M("one-token-too-far", "h.seen - n_tokens >= h.fill)", "h.seen - n_tokens > h.fill)",
      ["trust:rollback"]),
    M("room-for-too-many", "BKVI_PAGE + c->sink_slots - h.sinks - h.fill);",
      "BKVI_PAGE + c->sink_slots - h.sinks);", ["trust:rejected"]),
    M("shrink-halves-the-window", "bkvi_halve(&h, h.used - (made.window_pages + 1));",
      "bkvi_halve(&h, h.used);", ["trust:shrinks"]),
    M("shrink-leaves-the-header", "*c = made;\n    bkvi_header_put(c, c->mem);", "*c = made;",
      ["trust:shrinks"]),
    M("shrink-page-off-by-one", "if (bkvi_place(h, i) < to->n_pages) continue;",
      "if (bkvi_place(h, i) <= to->n_pages) continue;", ["trust:shrinks"]),
    M("budget-not-exact", "(r == BKV_OK && c.bytes <= bytes)))",
      "(r == BKV_OK && c.bytes < bytes)))", ["trust:budget"]),

    # ---- saving, validation, export, selection
    M("save-overruns", "if (out_bytes < c->state_bytes) return BKV_E_MEMORY;", ";",
      ["trust:saved"]),
    M("checksum-skipped",
      "return bkvi_same(header + BKVI_SUM_AT, saved + BKVI_SUM_AT, 8) ? BKV_OK : BKV_E_STATE;",
      "return BKV_OK;", ["trust:broken"]),
    M("load-forgets-threads", "if (n_threads) cfg.n_threads = *n_threads;", ";", ["trust:saved"]),
    M("load-does-not-validate", "if ((r = bkv_validate(&made)) == BKV_OK) *c = made;", "*c = made;",
      ["trust:broken"]),
    M("drafts-not-in-sum", "bkvi_put32(h->mem + 32, h->sum + h->drafts);",
      "bkvi_put32(h->mem + 32, h->sum);", ["trust:validation"]),
    M("halvings-overflow", "|| h.halvings > h.seen ||", "||", ["trust:validation"]),
    M("nearly-a-pin", "&& use != BKVI_PINNED) return 0;", "&& use > BKVI_PINNED) return 0;",
      ["trust:impossible"]),
    M("sum-not-validated", "if (sum != h.sum || h.drafts > h.seen ||", "if (h.drafts > h.seen ||",
      ["trust:validation"]),
    M("header-not-validated", "if (!bkvi_same(header, c->mem, sizeof header)) return BKV_E_STATE;", ";",
      ["trust:validation"]),
    M("coarse-logarithm", "for (i = 0; i < 24; i++) {", "for (i = 0; i < 12; i++) {",
      ["trust:exported"]),
    M("mask-sign", "*x = bkvi_log(w);", "*x = -bkvi_log(w);", ["trust:exported"]),
    M("empty-rows-seen", "? 0xFF800000u : 0xFC00FC00u);", "? 0u : 0u);",
      ["trust:exported"]),
    M("export-is-stale", "rows->seen <= h.seen && rows->halvings == h.halvings &&",
      "rows->seen <= h.seen &&", ["trust:exported"]),
    M("export-starts-late", "bkvi_slot_of(&h, bkvi_held(&h) - rows->n) : 0;",
      "bkvi_slot_of(&h, bkvi_held(&h) - rows->n) + 1 : 0;", ["trust:exported"]),
    M("export-without-rests", "bkvi_rest(&h, BKVI_K + i, row));",
      "row < c->sink_slots ? bkvi_rest(&h, BKVI_K + i, row) : NULL);", ["trust:exported"]),
    M("export-overflows", "type[i] == BKV_F16 ? 65520.0f : 2.0f * BKVI_HUGE",
      "2.0f * BKVI_HUGE", ["trust:exported"]),
    M("rests-of-one-page-too-few", "i > 0 && i + pages > h->used; i--", "i > 0 && i + pages > h->used + 1; i--",
      ["golden:f32"]),
    M("rests-take-no-turns", "turn = (uint32_t)((h->halvings + i) % pages);", "turn = h->used - i;",
      ["trust:exported", "golden:f32"]),
    M("rests-of-what-may-be-halved", "bkvi_min(window + 1, 4)", "bkvi_min(window + 2, 4)",
      ["api:constant_sizes", "golden:f32"]),
    M("shrink-leaves-the-turns", "i <= BKVI_V_REST && to->rests < c->rests; i++", "i < BKVI_K_REST; i++",
      ["trust:shrink"]),
    M("rows-of-the-type-stored", "size_t bytes = bkvi_type_bytes(kv_type);",
      "size_t bytes = bkvi_type_bytes(BKVI_TYPE(kv_type));", ["trust:exported_rows@pinned"]),
    M("select-stride", "index[(size_t)head * cfg->budget + i]", "index[(size_t)head * c.slots + i]",
      ["trust:selects"]),
    M("kind-off-by-one", "bkvi_held(&h) - i <= c->window", "bkvi_held(&h) - i < c->window",
      ["stream:state_at"]),
    M("errors-added-up", "bkvi_getf(h.mem + BKVI_ERROR_AT) / (float)c->cfg.n_kv_heads;",
      "bkvi_getf(h.mem + BKVI_ERROR_AT);", ["attend:errors"]),

    # ---- one operation of each backend, and more
    M("scalar-unsigned-bytes", "*(const int8_t *)p)", "*(const uint8_t *)p)",
      ["attend:exact"]),
    M("avx2-f16-truncates", "_mm256_cvtps_ph(x, 0)", "_mm256_cvtps_ph(x, 3)",
      ["convert:values@avx2"]),
    M("avx2-zip", "_mm256_permute2f128_ps(low, high, 0x31)",
      "_mm256_permute2f128_ps(low, high, 0x13)", ["golden:f32@avx2", "hash@avx2"]),
    M("avx512-sixteenth-lane", "(__mmask16)0xFFFF, x, 0)", "(__mmask16)0x7FFF, x, 0)",
      ["convert:values@avx512"]),
    M("avx512-not-greater", "(a, b, 30 /* > */)", "(a, b, 29 /* >= */)",
      ["attend:exact@avx512"]),
    M("avx512-fma-sign", "vfmadd231ps %2", "vfnmadd231ps %2", ["attend:exact@avx512"]),
    M("neon-zip", "BKVI_I(vzip1q_f32)(BKVI_F(*a)", "BKVI_I(vzip2q_f32)(BKVI_F(*a)",
      ["golden:f32@neon"]),
    M("neon-lane", "i % 4 == 2 ? vfmaq_laneq_f32(y, x, four, 2)",
      "i % 4 == 2 ? vfmaq_laneq_f32(y, x, four, 3)", ["golden:f32@neon"]),
    M("neon-bf16", "vreinterpret_u16_u8(vld1_u8((const uint8_t *)p)), 16))",
      "vreinterpret_u16_u8(vld1_u8((const uint8_t *)p)), 15))", ["golden:bf16@neon"]),
    M("sign-without-fma", "return product + z;", "return product - z;", ["hash@nofma"]),
    M("top-of-half", "for (n = 1; n < BKVI_WIDTH; n *= 2)", "for (n = 2; n < BKVI_WIDTH; n *= 2)",
      ["attend:exact@avx2", "golden:f32@avx2", "hash@avx2"]),

    # ---- kernels: rows and bytes
    M("row-overread", "uint32_t count = bkvi_min(BKVI_LANES, n - i);",
      "uint32_t count = BKVI_LANES;", ["attend:exact"]),
    M("negative-not-scanned", "size = bkvi_v(max)(x, zero - x);", "size = bkvi_v(max)(x, x);",
      ["api:bad_values"]),
    M("rotation-sign", "b = (a - b) * bkvi_v(set)(factor);", "b = (b - a) * bkvi_v(set)(factor);",
      ["attend:exact"]),
    M("scale-to-nearest", "bkvi_bits(bkvi_v(fold)(largest, 0) / most) + 0xFFFFu",
      "bkvi_bits(bkvi_v(fold)(largest, 0) / most) + 0x7FFFu", ["convert:values"]),
    M("rest-in-64ths", "bkvi_v(set)(bkvi_parts(type)), magic)",
      "bkvi_v(set)(0.5f * bkvi_parts(type)), magic)", ["attend:exact"]),
    M("fetch-in-64ths", "step * (1.0f / bkvi_parts(type))", "step * (2.0f / bkvi_parts(type))",
      ["trust:exported"]),

    # ---- kernels: integers of 4 bits
    M("rest-of-4-bits-in-128ths", "? 14.0f : 128.0f;", "? 128.0f : 128.0f;", ["convert:values"]),
    M("rest-of-4-bits-in-16ths", "? 14.0f : 128.0f;", "? 16.0f : 128.0f;", ["convert:values"]),
    M("steps-to-eight", "bkvi_is_i4(type) ? 7.0f : 127.0f;", "bkvi_is_i4(type) ? 8.0f : 127.0f;",
      ["convert:values"]),
    M("digits-of-base-15", "bkvi_v(set)(16.0f), bkvi_v(load)(x + i)", "bkvi_v(set)(15.0f), bkvi_v(load)(x + i)",
      ["convert:values"]),
    M("keys-in-whole-bytes", "k = bkvi_units(BKVI_TYPE(c->cfg.kv_type), r->head_dim);", "k = r->head_dim;",
      ["api:constant_sizes"]),
    M("tile-of-low-halves", "bkvi_v(load_i4)(x + at, high)", "bkvi_v(load_i4)(x + at, 0)", ["attend:exact"]),
    M("block-of-low-halves", "view = type + high,", "view = type,", ["golden:f32"]),
    M("refit-of-low-halves", "bkvi_v(get)((int)(type + high), from)", "bkvi_v(get)((int)type, from)",
      ["golden:f32"]),
    M("error-of-low-halves", "bkvi_v(get)((int)(type + high), v);", "bkvi_v(get)((int)type, v);",
      ["attend:errors"]),
    M("export-of-low-halves", "src, type + high, stride", "src, type, stride",
      ["trust:exported"]),
    M("export-of-low-rests", "rest, type + high, stride", "rest, type, stride",
      ["trust:exported"]),

    # ---- kernels: halving
    M("means-doubled", "turned[j] * (1.0f / (float)BKVI_BLOCK);",
      "turned[j] * (2.0f / (float)BKVI_BLOCK);", ["golden:f32"]),
    M("expected-by-other-weights", "bkvi_k(largest)(logit), weight",
      "bkvi_k(largest)(logit), weight + 4", ["golden:f32"]),
    M("like-the-others", "bkvi_v(set)(-10.0f * BKVI_LOG2E)", "bkvi_v(set)(10.0f * BKVI_LOG2E)",
      ["stream:odd_keys"]),
    M("keys-less-sharp", "-10.0f * BKVI_LOG2E", "-4.0f * BKVI_LOG2E", ["golden:f32"]),
    M("keys-do-not-tell", "importance & BKV_IMPORTANCE_KEY ? block->unlike : block->weight;",
      "block->weight;", ["golden:f32"]),
    M("share-of-use", "use, block->norm, 2.0f);", "use, block->norm, 1.0f);", ["golden:f32"]),
    M("kernel-factor", "bkvi_v(set)(factor[k] * a) * col;", "bkvi_v(set)(factor[k] * a);",
      ["golden:f32"]),
    M("temp-ignored", "cfg->scale * cfg->temp * BKVI_LOG2E", "cfg->scale * BKVI_LOG2E",
      ["golden:f32"]),
    M("kernel-constant", "(1.0f / 4096.0f)", "(1.0f / 512.0f)", ["golden:f32"]),
    M("exchange-sign", "bkvi_v(fma)(bkvi_v(load)(step + j), x + x, bkvi_v(load)(own + j));",
      "bkvi_v(fma)(bkvi_v(load)(step + j), zero - (x + x), bkvi_v(load)(own + j));",
      ["stream:rounds_of"]),
    M("exchange-for-nothing", "if (!bkvi_v(any_gt)(most, least)) continue;", ";",
      ["golden:f32"]),
    M("kernel-not-mirrored", "j = bkvi_max(first, i + 1); j < end;",
      "j = bkvi_max(first, i + 1); j < end && values;", ["golden:f32"]),
    M("refit-of-what-nothing-tells", "cfg->importance & (BKV_IMPORTANCE_KEY | BKV_IMPORTANCE_QUERY))",
      "1)", ["stream:values_move"]),
    M("no-refit", "bkvi_kernels_of(cfg->backend).refit(h, slots, block);", ";",
      ["stream:values_move"]),
    M("refit-of-certain-values", "block->score[i] = 1.0f - grown;",
      "block->score[i] = 0.99f - grown;", ["stream:values_move"]),
    M("refit-moves-certain-values", "if (block->score[i] < 0.0f) takes",
      "if (block->score[i] <= 0.0f) takes", ["stream:values_move"]),
    M("refit-of-whole-values", "x * bkvi_v(load)(block->score + j));", "x);", ["golden:f32"]),
    M("refit-by-the-square", "x = x * x * (x * (bkvi_v(load)",
      "x = x * (x * (bkvi_v(load)", ["golden:f32"]),
    M("refit-by-the-fourth", "x = x * x * (x * (bkvi_v(load)",
      "x = x * x * (x * x * (bkvi_v(load)", ["golden:f32"]),
    M("refit-without-factors", "(bkvi_v(load)(block->factor + j) * b)",
      "(bkvi_v(set)(block->factor[i]) * b)", ["golden:f32"]),
    M("refit-far-from-the-mean", "(from[i] + 1e-6f)", "(from[i] + 1e-7f)", ["golden:f32"]),
    M("refit-in-whole-steps", "bkvi_v(set)(-0.5f / (block->factor[i]",
      "bkvi_v(set)(-1.0f / (block->factor[i]", ["golden:f32"]),
    M("refit-of-what-is-short", "(bkvi_v(load)(h_i + j), minus_r,",
      "(bkvi_v(load)(h_i + j), bkvi_v(set)(0.0f),", ["golden:f32"]),
    M("refit-all-at-once", "BKVI_PAGE, BKVI_LANES, k - before,",
      "BKVI_PAGE, BKVI_LANES, 0,", ["golden:f32"]),
    M("refit-by-another-token", "among[k * BKVI_BLOCK + j] = h_i[takes[j]];",
      "among[k * BKVI_BLOCK + j] = h_i[j];", ["golden:f32"]),
    M("refit-of-64-dimensions", "first < v_dim; first += BKVI_PAGE", "first < 64; first += BKVI_PAGE",
      ["golden:f32"]),
    M("refit-of-full-weight", "bkvi_v(set)(-block->chance[takes[k]])", "bkvi_v(set)(-1.0f)",
      ["golden:f32"]),
    M("refit-of-bytes-without-scale", "if (bkvi_is_int(type)) scale =", "if (type > 6) scale =",
      ["golden:f32"]),
    M("refitted-beyond-f16", "type == BKV_F16 ? 65520.0f : BKVI_HUGE / 32.0f;", "BKVI_HUGE / 32.0f;",
      ["stream:too_large"]),
    M("refitted-beyond-all", "BKVI_HUGE / 32.0f;", "BKVI_HUGE * 32.0f;", ["stream:too_large"]),
    M("turned-twice", "if (src != (unsigned char *)work)", "if (src)", ["golden:f32"]),

    # ---- kernels: attention
    M("power-of-two", "6.931471825e-1f", "6.931461825e-1f", ["attend:powers"]),
    M("never-quite-zero", "t[k], bkvi_v(set)(-127.0f));", "t[k], bkvi_v(set)(-126.0f));",
      ["attend:powers"]),
    M("error-of-exact-tokens", "y = x - x / bkvi_v(load_f32)(span->weight + 4 * (size_t)i);",
      "y = x;", ["attend:errors"]),
    M("error-rate", "bkvi_getf(error) > 0.0f ? 0.0625f : 1.0f",
      "bkvi_getf(error) > 0.0f ? 0.125f : 1.0f", ["attend:errors"]),
    M("softcap-base", "bkvi_v(set)(cap * BKVI_LOG2E));", "bkvi_v(set)(cap));",
      ["attend:exact"]),
    M("sum-not-shrunk", "bkvi_v(store)(lanes + i, bkvi_v(load)(lanes + i) * shrink[0]);", ";",
      ["attend:exact"]),
    M("weight-only-below", "k * BKVI_WIDTH, t[k] * w);", "k * BKVI_WIDTH, t[k]);",
      ["attend:weighted"]),
    M("use-not-squared", "bkvi_v(fma)(x, x, bkvi_v(load_f32)(use))",
      "bkvi_v(fma)(x, bkvi_v(set)(1.0f), bkvi_v(load_f32)(use))", ["golden:f32"]),
    M("use-of-one-page", "b + 2 < n_blocks || h->drafts", "b + 1 < n_blocks || h->drafts",
      ["golden:f32"]),
    M("learns-the-opposite", "bkvi_v(fma)(x - m,", "bkvi_v(fma)(m - x,", ["golden:f32"]),
    M("sees-the-next", "last_fill - run->n + 1 + token", "last_fill - run->n + 2 + token",
      ["stream:ways"]),
    M("maximum-in-base-2", "max[r] * BKVI_LN2;", "max[r];", ["attend:partials"]),
    M("negative-zero", "t->max[r] == 0.0f ? 0.0f : t->max[r] * BKVI_LN2;", "t->max[r] * BKVI_LN2;",
      ["kernels:zeros@all"]),
    M("sum-of-half-the-lanes", "for (n = BKVI_REGS / 2; n; n /= 2)",
      "for (n = BKVI_REGS / 2; n > 1; n /= 2)",
      ["attend:exact"]),
]


def header():
    with open(ROOT + "/balancekv.h", encoding="utf-8") as file:
        return file.read()


def check(text):
    """The list against the header as it is now."""
    tally = Tally()
    for m in MUTATIONS:
        tally.check(text.count(m.old) == 1, "%s: its old text occurs %d times in balancekv.h"
                    % (m.name, text.count(m.old)), m.old)
        tally.check(m.new != m.old and m.tests, m.name + " changes nothing or names no test")
    names = [m.name for m in MUTATIONS]
    tally.check_none("names used twice", [name for name in names if names.count(name) > 1])
    return tally


def section(text, old):
    return "§" + re.findall(r"---- §(\d+) [A-Z]", text[:text.index(old)])[-1]


# ---- builds ------------------------------------------------------------------------------------
def simd(name, flags=""):
    return ["-DBALANCEKV_DISPATCH=0", "-DBALANCEKV_SIMD=BALANCEKV_SIMD_" + name] + flags.split()


FAST_SCALAR = "-mfma" if on_x86() else ""
BUILDS = {  # one backend compiles a good deal faster than all of them
    "scalar": simd("SCALAR", FAST_SCALAR),
    "soft": simd("SCALAR"),  # fused multiply-add made of doubles
    "nofma": simd("SCALAR", FAST_SCALAR) + ["-DBALANCEKV_FMA=0"],
    "pinned": simd("SCALAR", FAST_SCALAR)
              + ["-DBALANCEKV_KV_TYPE=BALANCEKV_F16", "-DBALANCEKV_HEAD_DIM=64"],
    "avx2": simd("AVX2", "-mavx2 -mfma -mf16c"),
    "avx512": simd("AVX512", "-mavx512f -mavx2 -mfma -mf16c"),
    "neon": simd("NEON"),  # in an emulator, but on AArch64
    "all": [],  # as by default, what the CPU has is found at run time
}


def on_arm64():
    return platform.machine() in ("aarch64", "arm64")


@lru_cache(None)
def available(build):
    if build == "neon":
        return on_arm64() or bool(shutil.which(CROSS) and shutil.which(EMULATOR))
    if build in ("avx2", "avx512"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return on_x86() and build.replace("512", "512f") in file.read().split()
    return build not in ("soft", "all") or on_x86()


# ---- one test on one header --------------------------------------------------------------------
class Broken(Exception):
    """No verdict: it does not compile, or is red without any mutation."""


def failure(folder, test):
    """Compiles a test with the balancekv.h in the folder and runs it; what was red, or None."""
    what, _, build = test.partition("@")
    program, _, part = what.partition(":")
    build = build or "scalar"
    cross = build == "neon" and not on_arm64()
    source = "bench/hash.c" if program == "hash" else "tests/test_%s.c" % program
    with tempfile.TemporaryDirectory() as scratch:
        binary = scratch + "/test"
        made = subprocess.run(
            [CROSS if cross else "cc", "-std=c99", "-O1", "-I", folder] + BUILDS[build]
            + ["-static"] * cross + [ROOT + "/" + source, "-o", binary, "-lm", "-lpthread"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True, check=False)
        if made.returncode:
            raise Broken("does not compile: " + made.stdout[-500:])
        command = [EMULATOR] * cross + [binary] + [part] * bool(part)
        if program == "hash":
            golden = ROOT + "/bench/hash%s.golden" % ("-nofma" if build == "nofma" else "")
            with open(golden, encoding="utf-8") as file:
                command += ["--expect", file.read().strip()]
        try:
            ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                 universal_newlines=True, errors="replace", timeout=TIMEOUT,
                                 env=dict(os.environ, BKV_QUICK="1"), check=False)
        except subprocess.TimeoutExpired:
            return "%s, endless" % test
    if ran.returncode == 0:
        return None
    red = re.search(r"^FAILED +(\w+)", ran.stdout, re.M)
    if program != "hash" and not red and ran.returncode > 0:
        raise Broken("%s failed, but no test of it: %s" % (test, ran.stdout[-300:]))
    if ran.returncode < 0:
        how = "%s of `%s`" % (signal.Signals(-ran.returncode).name, part or program)
    else:
        how = "`%s`" % red.group(1) if red else "another hash"
    return "%s, %s%s" % (source, how, "" if build == "scalar" else ", build `%s`" % build)


@lru_cache(None)
def green(test):
    return failure(ROOT, test) is None


def caught_by(mutation):
    """(1, what caught it), (0, what went wrong) or (None, why it was left out)."""
    tests = [test for test in mutation.tests if available((test.partition("@")[2] or "scalar"))]
    if not tests:
        return None, "left out: this machine has not what %s needs" % mutation.tests[0]
    try:
        with tempfile.TemporaryDirectory() as folder:
            with open(folder + "/balancekv.h", "w", encoding="utf-8") as file:
                file.write(header().replace(mutation.old, mutation.new))
            for test in tests:
                red = failure(folder, test)
                if red and not green(test):
                    raise Broken("%s is red on the unbroken header, too" % test)
                if red:
                    return 1, red
    except Broken as error:
        return 0, str(error)
    return 0, "SURVIVES %s" % ", ".join(tests)


# ---- all of them -------------------------------------------------------------------------------
PAGE = """# Mutations

Each line is a change that breaks `balancekv.h`, one at a time, and the test that went red for it,
with `BKV_QUICK=1`. The build is one backend, scalar if no other is named: it compiles fastest.
Written by `python3 tests/mutate.py --markdown`.

| Mutation | in | this | becomes | red | on |
|---|---|---|---|---|---|
%s

%d of the %d in `tests/mutate.py`.
"""
PAGE_AT = ROOT + "/tests/MUTATIONS.md"


def code(text):
    """Of a table: one line, with nothing that would end the cell."""
    text = " ".join(text.split())
    return "*nothing*" if text in ("", ";") else "`%s`" % text.replace("|", "\\|")


def cells(text, m):
    """How the row of a mutation begins: of another one it would be, if it had changed."""
    return "| %s | %s | %s | %s | " % (m.name, section(text, m.old), code(m.old), code(m.new))


def write_page(text, caught):
    """The rows of this run, but for what survives; those of mutations that did not run stay."""
    rows = []
    if os.path.exists(PAGE_AT):
        with open(PAGE_AT, encoding="utf-8") as file:
            rows = file.read().split("\n")
    page = []
    for m in MUTATIONS:
        begin = cells(text, m)
        if caught.get(m.name):
            page.append("%s%s | %s |" % (begin, caught[m.name], datetime.date.today()))
        elif m.name not in caught:
            page += [row for row in rows if row.startswith(begin)]
    with open(PAGE_AT, "w", encoding="utf-8") as file:
        file.write(PAGE % ("\n".join(page), len(page), len(MUTATIONS)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--only", metavar="NAME,..", default="")
    parser.add_argument("--jobs", metavar="N", type=int, default=1)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    text = header()
    fits = check(text)
    if args.check or fits.failed:
        fits.done()
    chosen = [m for m in MUTATIONS if any(part in m.name for part in args.only.split(","))]
    caught, counts = {}, {1: 0, 0: 0, None: 0}
    with ThreadPoolExecutor(args.jobs) as pool:
        for done, (m, (verdict, how)) in enumerate(zip(chosen, pool.map(caught_by, chosen)), 1):
            counts[verdict] += 1
            print("%-26s %-4s %s" % (m.name, section(text, m.old), how), flush=True)
            if sys.stderr.isatty():
                print("%d of %d\r" % (done, len(chosen)), end="", file=sys.stderr, flush=True)
            if verdict is not None:
                caught[m.name] = how if verdict else None
            if args.markdown:  # at once, as all of them take long
                write_page(text, caught)
    if counts[None]:
        print("%d left out" % counts[None])
    print("%d passed, %d failed" % (counts[1], counts[0]))
    return counts[0] > 0 or not counts[1]


if __name__ == "__main__":
    sys.exit(main())
