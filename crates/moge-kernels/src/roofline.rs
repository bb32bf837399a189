//! What the machine can do at best: the rates that kernels are measured against.
//!
//! Each measurement is short ([`DURATION`]), so that it can stand between the repetitions of what it is compared with:
//! on a shared machine the ceiling itself moves.

use std::hint::black_box;
use std::time::{Duration, Instant};

use crate::cpu::{Cpu, SharedMut};
use crate::isa::Isa;
use crate::simd::{Simd, SimdOp};

/// How long one measurement takes at least; at most twice as long.
const DURATION: Duration = Duration::from_millis(50);

/// Chunks per thread that a measurement begins with.
const NUM_FIRST_CHUNKS: usize = 4;

/// Independent chains of multiply-adds that are one instruction: two may start per cycle, and each takes four or five.
/// Their first numbers go through a `black_box`, or else the compiler might see that all chains compute the same.
const NUM_CHAINS: usize = 10;

/// Steps of each chain in a chunk: some tenths of a millisecond.
const NUM_STEPS: usize = 1 << 16;

/// Steps whose sums fit 16 bits, two products of an unsigned int4 and an int8 number each: 8 * 2 * 15 * 127 < 2^15.
const NARROW_STEPS: usize = 8;

/// The integer product that a weight format needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Int8Product {
    /// int8 weights by int8 activations. On AVX2 `vpmaddwd` and `vpaddd` for 16 products; two `vpmaddubsw` and `vpaddw` on
    /// nibbles have the same rate.
    I8xI8,
    /// Unsigned int4 weights by int8 activations. On AVX2 sums of eight steps fit 16 bits: `vpmaddubsw` and `vpaddw` for
    /// 32 products, and `vpmaddwd` and `vpaddd` after every eighth.
    U4xI8,
}

/// Operations per second of all threads in the multiply-accumulate of `product`, two operations each, with the
/// instructions of the [`Isa`] in use. Where the CPU has VNNI both products are `vpdpbusd`.
pub fn int8_ops_per_s(cpu: &Cpu, product: Int8Product) -> f64 {
    let isa = cpu.isa();
    let products_per_step = run_int8_chunk(isa, product);
    rate(cpu, (2 * NUM_STEPS * products_per_step) as f64, |_| {
        run_int8_chunk(isa, product);
    })
}

/// Floating-point operations per second of all threads in fused multiply-adds of f32, two operations each: the ceiling
/// of bf16 weights too, which are widened and multiplied in f32.
pub fn f32_flops_per_s(cpu: &Cpu) -> f64 {
    let isa = cpu.isa();
    let products_per_step = isa.run(MultiplyAdd);
    rate(cpu, (2 * NUM_STEPS * products_per_step) as f64, |_| {
        isa.run(MultiplyAdd);
    })
}

/// A piece of memory that no cache holds, to be read as fast as possible.
#[derive(Debug)]
pub struct MemoryRead {
    numbers: Vec<f32>,
}

impl MemoryRead {
    /// Numbers that a thread reads at a time, 1 MiB.
    const CHUNK_LEN: usize = 1 << 18;

    /// Memory for measuring on `cpu`, all of it written.
    pub fn new(cpu: &Cpu) -> MemoryRead {
        let num_chunks = MemoryRead::num_chunks(cpu.num_threads());
        let mut numbers = vec![0.0; num_chunks * MemoryRead::CHUNK_LEN];
        let shared = SharedMut::new(&mut numbers);
        // Each thread writes what it may well read: the system gives memory near to the thread that first touches it.
        cpu.for_each(num_chunks, |chunk| {
            // SAFETY: Chunks are different pieces.
            unsafe { shared.slice(chunk * MemoryRead::CHUNK_LEN..(chunk + 1) * MemoryRead::CHUNK_LEN) }.fill(1.0);
        });
        MemoryRead { numbers }
    }

    /// Bytes that [`MemoryRead::new`] takes on a [`Cpu`] of `num_threads`.
    pub fn bytes(num_threads: usize) -> u64 {
        (MemoryRead::num_chunks(num_threads) * MemoryRead::CHUNK_LEN * size_of::<f32>()) as u64
    }

    /// 64 MiB for each thread, several times its share of any last-level cache, and 512 MiB for one that has such a cache
    /// to itself.
    fn num_chunks(num_threads: usize) -> usize {
        (64 * num_threads).max(512)
    }

    /// Bytes per second at which all threads of `cpu` together read memory, by plain loads as wide as the CPU has.
    pub fn bytes_per_s(&self, cpu: &Cpu) -> f64 {
        // The widest loads, whatever features kernels use: this is the memory's ceiling.
        let isa = Isa::best();
        let num_chunks = self.numbers.len() / MemoryRead::CHUNK_LEN;
        rate(cpu, (MemoryRead::CHUNK_LEN * size_of::<f32>()) as f64, |chunk| {
            let start = chunk % num_chunks * MemoryRead::CHUNK_LEN;
            isa.run(Read(&self.numbers[start..start + MemoryRead::CHUNK_LEN]));
        })
    }
}

/// Units of work per second over all threads, where `body` does `units_per_chunk` of them.
fn rate(cpu: &Cpu, units_per_chunk: f64, body: impl Fn(usize) + Sync) -> f64 {
    let mut num_chunks = NUM_FIRST_CHUNKS * cpu.num_threads();
    // Wakes the threads.
    cpu.for_each(num_chunks, &body);
    let first_chunk = num_chunks;
    let mut next_chunk = first_chunk;
    let start = Instant::now();
    while start.elapsed() < DURATION {
        cpu.for_each(num_chunks, |chunk| body(next_chunk + chunk));
        next_chunk += num_chunks;
        // Longer each time, so that the ends, where threads wait for one another, weigh little.
        num_chunks *= 2;
    }
    units_per_chunk * (next_chunk - first_chunk) as f64 / start.elapsed().as_secs_f64()
}

/// Read numbers and make nothing of them.
struct Read<'a>(&'a [f32]);

impl SimdOp for Read<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        /// Places of the piece that are read side by side: a Zen 3 core reads four at 22 GB/s, and one at 16.
        const NUM_STREAMS: usize = 4;
        const NUM_REGISTERS: usize = 8;
        let stream_len = self.0.len() / NUM_STREAMS;
        let step_len = NUM_REGISTERS * S::LANES;
        let mut largest = [simd.splat(0.0); NUM_REGISTERS];
        for step in 0..stream_len / step_len {
            for stream in 0..NUM_STREAMS {
                for register in 0..NUM_REGISTERS {
                    let place = stream * stream_len + step * step_len + register * S::LANES;
                    // SAFETY: A step's numbers lie inside their stream, and the streams inside the piece.
                    let numbers = unsafe { simd.load_f32(self.0.as_ptr().add(place)) };
                    largest[register] = simd.max(largest[register], numbers);
                }
            }
        }
        black_box(largest);
    }
}

/// Multiply-adds in registers; gives the products per step.
struct MultiplyAdd;

impl SimdOp for MultiplyAdd {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> usize {
        let factor = simd.splat(black_box(0.5));
        let mut sums = black_box([simd.splat(1.0); NUM_CHAINS]);
        for _ in 0..NUM_STEPS {
            for sum in &mut sums {
                *sum = simd.mul_add(*sum, factor, factor);
            }
        }
        black_box(sums);
        NUM_CHAINS * S::LANES
    }
}

/// Run a chunk of `product` on `isa`; gives the products per step.
fn run_int8_chunk(isa: Isa, product: Int8Product) -> usize {
    #[cfg(target_arch = "x86_64")]
    match (isa.name(), product) {
        ("avx512vnni", _) => {
            // SAFETY: This ISA has AVX-512 VNNI.
            return unsafe { x86::vnni_avx512() };
        }
        ("avxvnni", _) => {
            // SAFETY: This ISA has AVX-VNNI.
            return unsafe { x86::vnni_avx2() };
        }
        ("avx2" | "avx512", Int8Product::I8xI8) => {
            // SAFETY: Both ISAs have AVX2.
            return unsafe { x86::i8_by_i8_avx2() };
        }
        ("avx2" | "avx512", Int8Product::U4xI8) => {
            // SAFETY: Both ISAs have AVX2.
            return unsafe { x86::u4_by_i8_avx2() };
        }
        _ => {}
    }
    let _ = (isa, product);
    multiply_integers()
}

/// A chunk of 32-bit integer multiply-adds, for CPUs of which we know nothing better.
fn multiply_integers() -> usize {
    let factor = black_box(3i32);
    let mut sums = black_box([1i32; NUM_CHAINS]);
    for _ in 0..NUM_STEPS {
        for sum in &mut sums {
            *sum = sum.wrapping_mul(factor).wrapping_add(factor);
        }
    }
    black_box(sums);
    NUM_CHAINS
}

/// Chunks of integer multiply-adds; each gives its products per step.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::{NARROW_STEPS, NUM_CHAINS, NUM_STEPS};

    /// One multiplication and addition for each of six sums, `ymm6` to `ymm11`. Each addition stands four multiplications
    /// after the one it adds. In this order a Zen 3 starts 1.7 of 2 possible pairs per cycle; in the order that the
    /// compiler gives to intrinsics it starts 1.5, because additions take the multipliers' ports.
    #[rustfmt::skip]
    macro_rules! six_pairs {
        ($multiply:literal, $add:literal) => {
            concat!(
                $multiply, " ymm0, ymm12, ymm12\n", $multiply, " ymm1, ymm12, ymm12\n",
                $add, " ymm8, ymm8, ymm2\n", $add, " ymm9, ymm9, ymm3\n",
                $multiply, " ymm2, ymm12, ymm12\n", $multiply, " ymm3, ymm12, ymm12\n",
                $add, " ymm10, ymm10, ymm4\n", $add, " ymm11, ymm11, ymm5\n",
                $multiply, " ymm4, ymm12, ymm12\n", $multiply, " ymm5, ymm12, ymm12\n",
                $add, " ymm6, ymm6, ymm0\n", $add, " ymm7, ymm7, ymm1\n",
            )
        };
    }

    /// Run lines of assembly in a loop. They may change `ymm0` to `ymm14`, which hold whatever they held.
    macro_rules! repeat {
        ($num_rounds:expr, $($line:expr),+) => {
            // SAFETY: The lines change nothing but registers, all of which are declared.
            unsafe {
                asm!(
                    "2:", $($line,)+ "dec {rounds}", "jnz 2b",
                    rounds = inout(reg) $num_rounds => _,
                    out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _, out("ymm4") _,
                    out("ymm5") _, out("ymm6") _, out("ymm7") _, out("ymm8") _, out("ymm9") _,
                    out("ymm10") _, out("ymm11") _, out("ymm12") _, out("ymm13") _, out("ymm14") _,
                    options(nomem, nostack),
                );
            }
        };
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn i8_by_i8_avx2() -> usize {
        repeat!(NUM_STEPS / NARROW_STEPS, ".rept 8", six_pairs!("vpmaddwd", "vpaddd"), ".endr");
        16 * 6
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn u4_by_i8_avx2() -> usize {
        repeat!(
            NUM_STEPS / NARROW_STEPS,
            ".rept 8",
            six_pairs!("vpmaddubsw", "vpaddw"),
            ".endr",
            // Widen the six sums.
            ".irp sum, 6, 7, 8, 9, 10, 11",
            "vpmaddwd ymm13, ymm\\sum, ymm12",
            "vpaddd ymm14, ymm14, ymm13",
            ".endr"
        );
        32 * 6
    }

    #[target_feature(enable = "avxvnni")]
    pub(super) fn vnni_avx2() -> usize {
        let factor = _mm256_set1_epi8(black_box(3));
        let mut sums = black_box([_mm256_set1_epi32(1); NUM_CHAINS]);
        for _ in 0..NUM_STEPS {
            for sum in &mut sums {
                *sum = _mm256_dpbusd_avx_epi32(*sum, factor, factor);
            }
        }
        black_box(sums);
        32 * NUM_CHAINS
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn vnni_avx512() -> usize {
        let factor = _mm512_set1_epi8(black_box(3));
        let mut sums = black_box([_mm512_set1_epi32(1); NUM_CHAINS]);
        for _ in 0..NUM_STEPS {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, factor, factor);
            }
        }
        black_box(sums);
        64 * NUM_CHAINS
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::{Int8Product, MemoryRead, f32_flops_per_s, int8_ops_per_s};
    use crate::{Cpu, Isa};

    #[test]
    fn every_ceiling_is_a_rate_on_every_isa() {
        for isa in Isa::available() {
            let cpu = Cpu::new(isa, 2);
            let memory = MemoryRead::new(&cpu);
            let rates = [
                int8_ops_per_s(&cpu, Int8Product::I8xI8),
                int8_ops_per_s(&cpu, Int8Product::U4xI8),
                f32_flops_per_s(&cpu),
                memory.bytes_per_s(&cpu),
            ];
            // No computer has ever been slower, and none is faster by so much.
            assert!(rates.iter().all(|rate| (1e6..1e18).contains(rate)), "{}: {rates:?}", isa.name());
        }
    }
}
