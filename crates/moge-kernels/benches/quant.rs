#![allow(unsafe_code, clippy::all, missing_docs)]
use moge_kernels::*;
use std::hint::black_box;
use std::time::Instant;
const HIDDEN: usize = 5120;
const INTER: usize = 1344;
fn main() {
    let cpu = Cpu::new(Isa::best(), 2);
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let big: Vec<f32> = (0..64 << 20).map(|i| ((i * 7919) % 1021) as f32 / 1021.0 - 0.5).collect();
    for format in [PackedFormat::W4A8, PackedFormat::W8A8] {
        // one gate/up pair, copied for 48 experts
        let one = pack(&cpu, format, &big[..INTER * HIDDEN], INTER, HIDDEN);
        let experts: Vec<Vec<u8>> = (0..64).map(|_| one.clone()).collect();
        let down1 = pack(&cpu, format, &big[..INTER * HIDDEN], HIDDEN, INTER);
        let downs: Vec<Vec<u8>> = (0..64).map(|_| down1.clone()).collect();
        for rows in [1usize, 2, 4, 8, 16, 64, 128] {
            if args.len() > 0 && !args.contains(&rows.to_string()) {
                continue;
            }
            let e = if rows >= 16 { 8 } else { 32 };
            let offsets: Vec<usize> = (0..=e).map(|i| i * rows).collect();
            let n = e * rows;
            let mut q = QuantizedRows::with_capacity(n, HIDDEN, e);
            let grouped = GroupedRows { offsets: &offsets, source_rows: None };
            q.quantize(&cpu, &big[..n * HIDDEN], HIDDEN, grouped);
            let mut out = vec![0.0; n * INTER];
            let ops = (n * INTER * HIDDEN * 4) as f64;
            let bytes = (e * one.len() * 2) as f64;
            let gu = |i: usize| {
                [
                    PackedMatrix::new(&experts[2 * (i % 32)], format, INTER, HIDDEN),
                    PackedMatrix::new(&experts[2 * (i % 32) + 1], format, INTER, HIDDEN),
                ]
            };
            report(&format!("{format:?} gate+up rows {rows}"), ops, bytes, format, &cpu, &big, || {
                packed_swiglu(&cpu, &mut out, &q, &gu)
            });
            let mut qi = QuantizedRows::with_capacity(n, INTER, e);
            qi.quantize(&cpu, &big[..n * INTER], INTER, grouped);
            let mut residual = vec![0.0; rows * HIDDEN];
            let source: Vec<u32> = (0..n).map(|i| (i % rows) as u32).collect();
            let weights = vec![0.1; n];
            let dn = |i: usize| PackedMatrix::new(&downs[i % 64], format, HIDDEN, INTER);
            let ex = ExpertsDown { inner: &qi, down: &dn, source_rows: &source, weights: &weights };
            report(&format!("{format:?} down rows {rows}"), ops / 2.0, bytes / 2.0, format, &cpu, &big, || {
                packed_experts_down(&cpu, &mut residual, HIDDEN, ex)
            });
            if rows == 64 {
                report(&format!("quantize {n}"), ops, (n * HIDDEN * 5) as f64, format, &cpu, &big, || {
                    q.quantize(&cpu, &big[..n * HIDDEN], HIDDEN, grouped)
                });
                let rows = 512;
                let offsets = [0, 512];
                let grouped = GroupedRows { offsets: &offsets, source_rows: None };
                let mut q = QuantizedRows::with_capacity(rows, HIDDEN, 1);
                q.quantize(&cpu, &big[..rows * HIDDEN], HIDDEN, grouped);
                let w = pack(&cpu, format, &big[..5376 * HIDDEN], 5376, HIDDEN);
                let mut out = vec![0.0; rows * 5376];
                report(
                    &format!("{format:?} dense 512"),
                    (2 * rows * 5376 * HIDDEN) as f64,
                    1.0,
                    format,
                    &cpu,
                    &big,
                    || packed_gemm(&cpu, &mut out, &q, PackedMatrix::new(&w, format, 5376, HIDDEN), None),
                );
            }
        }
    }
}
fn pack(cpu: &Cpu, format: PackedFormat, w: &[f32], rows: usize, cols: usize) -> Vec<u8> {
    let mut out = vec![0; format.weight_bytes(rows, cols)];
    let t = Instant::now();
    for (rows, out) in w.chunks(32 * cols).zip(out.chunks_mut(format.panel_bytes(cols))) {
        pack_panel(cpu.isa(), format, rows, cols, out);
    }
    println!("packed {} Mw/s/thread", (w.len() as f64 / 1e6 / t.elapsed().as_secs_f64()) as u64);
    out
}
fn seconds(f: impl FnOnce()) -> f64 {
    let t = Instant::now();
    f();
    t.elapsed().as_secs_f64()
}
fn report(name: &str, ops: f64, bytes: f64, format: PackedFormat, cpu: &Cpu, big: &[f32], mut f: impl FnMut()) {
    f();
    let mut v = vec![];
    for _ in 0..7 {
        let peak = int_peak(cpu, format);
        let bw = read(cpu, big);
        let n = 3;
        let t = seconds(|| {
            for _ in 0..n {
                f()
            }
        }) / n as f64;
        v.push((ops / t / peak, bytes / t / bw, ops / t / 1e9, bytes / t / 1e9, peak / 1e9, bw / 1e9));
    }
    let med = |k: &dyn Fn(&(f64, f64, f64, f64, f64, f64)) -> f64| {
        let mut x: Vec<f64> = v.iter().map(k).collect();
        x.sort_by(f64::total_cmp);
        x[x.len() / 2]
    };
    println!(
        "{name:24} {:6.1} GOP/s ({:.0} % of {:.0})   {:5.1} GB/s ({:.0} % of {:.1})",
        med(&|x| x.2),
        100. * med(&|x| x.0),
        med(&|x| x.4),
        med(&|x| x.3),
        100. * med(&|x| x.1),
        med(&|x| x.5)
    );
}
fn read(cpu: &Cpu, numbers: &[f32]) -> f64 {
    const CHUNK: usize = 1 << 18;
    let e =
        seconds(|| cpu.for_each(numbers.len() / CHUNK, |c| unsafe { read_avx2(&numbers[c * CHUNK..(c + 1) * CHUNK]) }));
    (numbers.len() * 4) as f64 / e
}
use std::arch::x86_64::*;
#[target_feature(enable = "avx2")]
unsafe fn read_avx2(numbers: &[f32]) {
    let mut bits = [_mm256_setzero_si256(); 8];
    for run in numbers.chunks_exact(64) {
        for i in 0..8 {
            bits[i] = _mm256_or_si256(bits[i], unsafe { _mm256_loadu_si256(run.as_ptr().add(8 * i).cast()) });
        }
    }
    black_box(bits);
}
fn int_peak(cpu: &Cpu, format: PackedFormat) -> f64 {
    const N: usize = 1_000_000;
    let e = seconds(|| cpu.for_each(2, |_| unsafe { if format == PackedFormat::W4A8 { peak4(N) } else { peak8(N) } }));
    let macs = if format == PackedFormat::W4A8 { 10 * 32 } else { 10 * 16 };
    (2 * N * macs * 2) as f64 / e
}
#[target_feature(enable = "avx2")]
unsafe fn peak4(n: usize) {
    let a = _mm256_set1_epi8(black_box(3));
    let mut s = [_mm256_setzero_si256(); 10];
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
    let mut s = [_mm256_setzero_si256(); 10];
    for _ in 0..n {
        for s in &mut s {
            *s = _mm256_add_epi32(*s, _mm256_madd_epi16(a, *s));
        }
    }
    black_box(s);
}
