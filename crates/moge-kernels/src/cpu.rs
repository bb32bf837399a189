//! Where kernels run: the CPU features in use and the worker pool.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

use crate::Isa;
use crate::pool::{MAX_THREADS, Pool};

/// Numbers that a chunk of a row-wise operator should at least hold: some microseconds of work.
const MIN_CHUNK_LEN: usize = 8192;

/// The CPU features in use and the worker pool. One thread at a time uses it, and operators do not nest: a
/// chunk cannot capture a `Cpu`, because it is not `Sync`.
///
/// ```compile_fail,E0277
/// let cpu = moge_kernels::Cpu::new(moge_kernels::Isa::best(), 2);
/// cpu.for_each(3, |_| cpu.for_each(3, |_| {}));
/// ```
pub struct Cpu {
    isa: Isa,
    num_threads: usize,
    pool: RefCell<Pool>,
}

impl std::fmt::Debug for Cpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cpu").field("isa", &self.isa).field("num_threads", &self.num_threads).finish_non_exhaustive()
    }
}

/// Threads that this process can run at once, by its affinity mask and its cgroup's quota; at most [`MAX_THREADS`].
pub fn available_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS)
}

impl Cpu {
    /// Kernels for `isa` on `num_threads` threads: the calling one and workers that this starts, fewer where the system
    /// refuses one. If they take all CPUs that the process may use, each worker is pinned to its own; the calling thread
    /// is not. With fewer, two processes would pin theirs to the same ones.
    ///
    /// # Panics
    /// If `num_threads` is 0 or above [`MAX_THREADS`].
    pub fn new(isa: Isa, num_threads: usize) -> Cpu {
        assert!((1..=MAX_THREADS).contains(&num_threads), "num_threads is {num_threads}, not 1 to {MAX_THREADS}");
        let cpus = allowed_cpus();
        let crowded = num_threads > available_threads();
        let pool = Pool::new(num_threads, crowded, move |worker| {
            if num_threads == cpus.len() {
                pin_this_thread(cpus[worker]);
            }
        });
        Cpu { isa, num_threads: pool.num_threads(), pool: RefCell::new(pool) }
    }

    /// The CPU features that kernels use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads, the calling one counted in.
    pub fn num_threads(&self) -> usize {
        self.num_threads
    }

    /// Call `body(chunk)` once for each chunk below `num_chunks`, spread over the threads; returns when all
    /// are done. Chunks are started in order, each by the next free thread.
    ///
    /// # Panics
    /// With the panic of a chunk, after the other threads have finished theirs; chunks not begun are dropped.
    pub fn for_each(&self, num_chunks: usize, body: impl Fn(usize) + Sync) {
        self.for_each_with_worker(num_chunks, |_, chunk| body(chunk));
    }

    /// As [`Cpu::for_each`], with `body(worker, chunk)`, where `worker` is below [`Cpu::num_threads`] and no two
    /// chunks of the same worker run at once.
    ///
    /// # Panics
    /// As [`Cpu::for_each`].
    pub fn for_each_with_worker(&self, num_chunks: usize, body: impl Fn(usize, usize) + Sync) {
        self.pool.borrow_mut().run(num_chunks, &body);
    }

    /// Call `body(chunk, slice)` for every `chunk_len` consecutive items of `items`, the last ones perhaps fewer.
    ///
    /// # Panics
    /// As [`Cpu::for_each`], and if `chunk_len` is 0.
    pub fn for_each_slice<T: Send>(&self, items: &mut [T], chunk_len: usize, body: impl Fn(usize, &mut [T]) + Sync) {
        self.for_each_slices([items], [chunk_len], |chunk, [slice]| body(chunk, slice));
    }

    /// As [`Cpu::for_each_slice`] over several slices side by side: chunk `i` has the `i`th `chunk_lens[j]` items of
    /// `items[j]`.
    ///
    /// # Panics
    /// As [`Cpu::for_each_slice`], and if the slices do not all give the same number of chunks.
    pub(crate) fn for_each_slices<T: Send, const N: usize>(
        &self,
        items: [&mut [T]; N],
        chunk_lens: [usize; N],
        body: impl Fn(usize, [&mut [T]; N]) + Sync,
    ) {
        let lens: [usize; N] = std::array::from_fn(|j| items[j].len());
        let num_chunks = lens[0].div_ceil(chunk_lens[0]);
        let equal = lens.iter().zip(chunk_lens).all(|(len, chunk_len)| len.div_ceil(chunk_len) == num_chunks);
        assert!(equal, "{lens:?} items in chunks of {chunk_lens:?}");
        let items = items.map(SharedMut::new);
        self.for_each(num_chunks, |chunk| {
            let slices = std::array::from_fn(|j| {
                let (start, end) = (chunk * chunk_lens[j], lens[j].min((chunk + 1) * chunk_lens[j]));
                // SAFETY: Chunks are disjoint.
                unsafe { items[j].slice(start..end) }
            });
            body(chunk, slices);
        });
    }

    /// Call `body(rows, slice)` for runs of whole rows of `out`, `[num_rows, row_len]`.
    pub(crate) fn for_each_rows(
        &self,
        out: &mut [f32],
        row_len: usize,
        body: impl Fn(Range<usize>, &mut [f32]) + Sync,
    ) {
        if out.is_empty() {
            return;
        }
        assert!(out.len().is_multiple_of(row_len), "{} numbers are not rows of {row_len}", out.len());
        let num_rows = out.len() / row_len;
        let rows_per_chunk = MIN_CHUNK_LEN.div_ceil(row_len);
        let out = SharedMut::new(out);
        self.for_each(num_rows.div_ceil(rows_per_chunk), |chunk| {
            let rows = chunk * rows_per_chunk..num_rows.min((chunk + 1) * rows_per_chunk);
            // SAFETY: Chunks are different runs of rows.
            let slice = unsafe { out.slice(rows.start * row_len..rows.end * row_len) };
            body(rows, slice);
        });
    }
}

/// A mutable slice of which threads take disjoint parts.
pub(crate) struct SharedMut<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: Handing out parts is `unsafe`: whoever does it promises that they are disjoint.
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> SharedMut<'a, T> {
        SharedMut { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// The part at `range`.
    ///
    /// # Safety
    /// No other part that is alive overlaps it.
    #[expect(clippy::mut_from_ref, reason = "the caller promises that parts are disjoint")]
    pub(crate) unsafe fn slice(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        // SAFETY: The range is inside the slice, and disjoint from others by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }

    /// Where the part at `range` begins, of which others may touch numbers that the caller does not.
    ///
    /// # Safety
    /// As for [`SharedMut::slice`], of the numbers that are read or written through the pointer.
    pub(crate) unsafe fn pointer(&self, range: Range<usize>) -> *mut T {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        // SAFETY: The start is inside the slice, or at its end.
        unsafe { self.start.add(range.start) }
    }
}

/// CPUs in this process's affinity mask; empty where there is no such thing.
#[cfg(target_os = "linux")]
fn allowed_cpus() -> Vec<usize> {
    // SAFETY: The set is plain bits, for which zero is a value, and the call writes at most its size.
    let (result, set) = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        (libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set), set)
    };
    if result != 0 {
        return Vec::new();
    }
    // SAFETY: Every index is below the number of bits.
    (0..libc::CPU_SETSIZE as usize).filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) }).collect()
}

/// Keep the current thread on `cpu`. It runs unpinned if the system refuses.
#[cfg(target_os = "linux")]
fn pin_this_thread(cpu: usize) {
    // SAFETY: The set is plain bits; `cpu` came out of such a set and is below its size.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
    }
}

#[cfg(not(target_os = "linux"))]
fn allowed_cpus() -> Vec<usize> {
    Vec::new()
}

#[cfg(not(target_os = "linux"))]
fn pin_this_thread(_cpu: usize) {}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::{Cpu, available_threads};
    use crate::Isa;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn each_chunk_runs_exactly_once_at_any_number_of_threads() {
        for num_threads in [1, 2, 3, 7] {
            let cpu = Cpu::new(Isa::scalar(), num_threads);
            for num_chunks in [0, 1, 2, 5, 100] {
                let counts: Vec<AtomicUsize> = (0..num_chunks).map(|_| AtomicUsize::new(0)).collect();
                cpu.for_each_with_worker(num_chunks, |worker, chunk| {
                    assert!(worker < num_threads);
                    counts[chunk].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn ten_thousand_small_operators_on_more_threads_than_cpus_finish() {
        let cpu = Cpu::new(Isa::scalar(), 2 * available_threads() + 1);
        let total = AtomicUsize::new(0);
        for _ in 0..10_000 {
            cpu.for_each(3, |chunk| {
                total.fetch_add(chunk + 1, Ordering::Relaxed);
            });
        }
        assert_eq!(total.load(Ordering::Relaxed), 60_000);
    }

    #[test]
    fn parked_workers_wake_for_the_next_operator() {
        let cpu = Cpu::new(Isa::scalar(), 2);
        for _ in 0..3 {
            std::thread::sleep(std::time::Duration::from_millis(20));
            // Each chunk waits for the other, so two threads must come.
            let arrived = AtomicUsize::new(0);
            cpu.for_each(2, |_| {
                arrived.fetch_add(1, Ordering::SeqCst);
                while arrived.load(Ordering::SeqCst) < 2 {
                    std::thread::yield_now();
                }
            });
        }
    }

    #[test]
    fn a_panic_in_a_chunk_reaches_the_caller_and_the_pool_goes_on() {
        for num_threads in [1, 3] {
            let cpu = Cpu::new(Isa::scalar(), num_threads);
            for bad_chunk in [0, 13, 39] {
                let result = catch_unwind(AssertUnwindSafe(|| {
                    cpu.for_each(40, |chunk| assert_ne!(chunk, bad_chunk, "chunk is bad"));
                }));
                let payload = result.unwrap_err();
                assert!(payload.downcast_ref::<String>().unwrap().contains("chunk is bad"));
                let total = AtomicUsize::new(0);
                cpu.for_each(40, |_| {
                    total.fetch_add(1, Ordering::Relaxed);
                });
                assert_eq!(total.load(Ordering::Relaxed), 40);
            }
        }
    }

    #[test]
    fn a_cpu_moves_to_another_thread() {
        let cpu = Cpu::new(Isa::best(), 2);
        let sum = std::thread::spawn(move || {
            let total = AtomicUsize::new(0);
            cpu.for_each(11, |chunk| {
                total.fetch_add(chunk, Ordering::Relaxed);
            });
            total.into_inner()
        });
        assert_eq!(sum.join().unwrap(), 55);
    }
}
