// Run-time dispatch: one build runs on any x86-64 and uses what the processor has. On aarch64 NEON
// is the baseline.
#pragma once

#if defined(PE_INFER_CLONES) && defined(__x86_64__)
#define PE_INFER_DISPATCH __attribute__((target_clones("default", "avx2", "arch=x86-64-v4")))
#else
#define PE_INFER_DISPATCH
#endif
