#![allow(unsafe_code, clippy::all, missing_docs)]
use moge_kernels::*;
use std::arch::x86_64::*;
use std::hint::black_box;
fn cpu_time() -> f64 {
    unsafe {
        let mut t: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut t);
        t.tv_sec as f64 + t.tv_nsec as f64 * 1e-9
    }
}
fn main() {
    let cpu = Cpu::new(Isa::best(), 1);
    let (rows_w, k) = (128, 2560);
    let big: Vec<f32> = (0..512 * 5120).map(|i| ((i * 7919) % 1021) as f32 / 1021.0 - 0.5).collect();
    for format in [PackedFormat::W4A8, PackedFormat::W8A8] {
        let mut wv = vec![0; format.weight_bytes(rows_w, k) + 64];
        let o = wv.as_ptr().align_offset(64);
        let w = &mut wv[o..o + format.weight_bytes(rows_w, k)];
        for (r, o) in big[..rows_w * k].chunks(32 * k).zip(w.chunks_mut(format.panel_bytes(k))) {
            pack_panel(cpu.isa(), format, r, k, o);
        }
        let w = PackedMatrix::new(w, format, rows_w, k);
        for n in [1usize, 2, 3, 4, 5, 8, 16, 33, 64] {
            let offsets = [0, n];
            let mut q = QuantizedRows::with_capacity(n, k, 1);
            q.quantize(&cpu, &big[..n * k], k, GroupedRows { offsets: &offsets, source_rows: None });
            let mut out = vec![0.0; n * rows_w];
            let reps = (24 / n).max(1);
            let mut shares = vec![];
            for _ in 0..101 {
                let t = cpu_time();
                unsafe { if format == PackedFormat::W4A8 { peak4(20_000) } else { peak8(20_000) } }
                let peak =
                    20_000.0 * 12.0 * (if format == PackedFormat::W4A8 { 32.0 } else { 16.0 }) / (cpu_time() - t);
                let t = cpu_time();
                unsafe { fma(20_000) }
                let f = 20_000.0 * 12.0 / (cpu_time() - t) / 2.0; // Hz
                let t = cpu_time();
                for _ in 0..reps {
                    packed_gemm(&cpu, &mut out, &q, w, None);
                }
                let rate = (reps * n * rows_w * k) as f64 / (cpu_time() - t);
                shares.push((rate / peak, rate / f, peak / f));
            }
            shares.sort_by(|a, b| a.0.total_cmp(&b.1));
            let m = shares[50];
            println!(
                "{format:?} n={n:2}: {:.0} % of peak, {:.1} MAC/cycle (peak loop {:.1}), {:.1} cycles per 8x32 block-group + row",
                100. * m.0,
                m.1,
                m.2,
                256.0 / m.1
            );
        }
    }
}
#[target_feature(enable = "avx2,fma")]
unsafe fn fma(n: usize) {
    let a = _mm256_set1_ps(black_box(0.5));
    let mut s = [a; 12];
    for _ in 0..n {
        for s in &mut s {
            *s = _mm256_fmadd_ps(a, *s, a);
        }
    }
    black_box(s);
}
#[target_feature(enable = "avx2")]
unsafe fn peak4(n: usize) {
    let a = _mm256_set1_epi8(black_box(3));
    let mut s = [_mm256_setzero_si256(); 12];
    for _ in 0..n {
        for s in &mut s {
            *s = _mm256_add_epi16(*s, _mm256_maddubs_epi16(a, *s));
        }
    }
    black_box(s);
}
#[target_feature(enable = "avx2")]
unsafe fn peak8(n: usize) {
    let a = _mm256_set1_epi8(black_box(3));
    let mut s = [_mm256_setzero_si256(); 12];
    for _ in 0..n {
        for s in &mut s {
            *s = _mm256_add_epi32(*s, _mm256_madd_epi16(a, *s));
        }
    }
    black_box(s);
}
