//! Worker threads that take the chunks of one operator after another.
//!
//! A step of a model is a few hundred operators, many of them a few microseconds long, so waking threads for
//! each would cost more than the arithmetic. Here the calling thread runs the model as plain sequential
//! code and publishes each operator; workers wait on one atomic word, spinning while a step is running,
//! and join. That is one parallel region per step without turning `forward` inside out.
//!
//! **Protocol.** [`Shared::state`] holds an epoch (which operator), an `OPEN` bit and the number of workers
//! inside. The caller writes the job, then stores the next epoch with `OPEN` set. A worker that sees a new
//! open epoch counts itself in by compare-and-exchange and takes chunks from a shared counter until none
//! is left; then it counts itself out. The caller takes chunks too, clears `OPEN`, and waits for the
//! workers inside. A worker that comes late finds the operator closed and is never waited for: a
//! descheduled thread costs its help, not the caller's time.
//!
//! **Waiting.** A worker spins briefly, then yields, then parks until it is notified, so that an idle engine
//! uses no CPU and more threads than CPUs do no harm.
//!
//! The protocol is model-checked with loom:
//! `RUSTFLAGS="--cfg loom" cargo test -p moge-kernels --release --lib --target-dir target/loom loom`.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::PoisonError;

use sync::{Arc, AtomicU64, AtomicUsize, Condvar, Mutex, Ordering, UnsafeCell, fence, spin_loop, thread};

/// What loom replaces.
#[cfg(loom)]
mod sync {
    pub(super) use loom::cell::UnsafeCell;
    pub(super) use loom::hint::spin_loop;
    pub(super) use loom::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};
    pub(super) use loom::sync::{Arc, Condvar, Mutex};
    pub(super) use loom::thread;
}

#[cfg(not(loom))]
mod sync {
    pub(super) use std::hint::spin_loop;
    pub(super) use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};
    pub(super) use std::sync::{Arc, Condvar, Mutex};
    pub(super) use std::thread;

    /// `std`'s cell with loom's interface.
    pub(super) struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

    impl<T> UnsafeCell<T> {
        pub(super) fn new(value: T) -> UnsafeCell<T> {
            UnsafeCell(std::cell::UnsafeCell::new(value))
        }

        pub(super) fn with<R>(&self, body: impl FnOnce(*const T) -> R) -> R {
            body(self.0.get())
        }

        pub(super) fn with_mut<R>(&self, body: impl FnOnce(*mut T) -> R) -> R {
            body(self.0.get())
        }
    }
}

/// Tries before a waiting worker yields: some 30 us, longer than the sequential code between two operators.
#[cfg(not(loom))]
const NUM_SPINS: u32 = 2_000;
/// Yields before a waiting worker parks: about a millisecond, longer than the pause between two steps.
#[cfg(not(loom))]
const NUM_YIELDS: u32 = 2_000;
/// loom explores every interleaving: one try stands for all.
#[cfg(loom)]
const NUM_SPINS: u32 = 0;
#[cfg(loom)]
const NUM_YIELDS: u32 = 1;

/// Bits of [`Shared::state`]: workers inside the operator. They hold [`MAX_THREADS`].
const INSIDE: u64 = 0xffff;
/// Workers may join.
const OPEN: u64 = 1 << 16;
/// Workers must return.
const STOP: u64 = 1 << 17;
/// The epoch is the upper half.
const EPOCH_SHIFT: u32 = 32;

/// Most threads of a [`crate::Cpu`], the calling one counted in.
pub const MAX_THREADS: usize = 4096;

/// One operator: `body(worker, chunk)` for each chunk below `num_chunks`.
#[derive(Clone, Copy)]
struct Job {
    body: *const (dyn Fn(usize, usize) + Sync),
    num_chunks: usize,
}

struct Shared {
    /// Epoch, `OPEN`, `STOP` and the number of workers inside.
    state: AtomicU64,
    /// The next chunk that nobody has taken.
    next_chunk: AtomicUsize,
    /// Workers that are parked or about to park.
    num_parked: AtomicUsize,
    /// The current operator; written by the caller while no worker is inside, read by workers inside.
    job: UnsafeCell<Option<Job>>,
    /// The first panic of the current operator.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// Held while a worker decides to park and while the caller notifies.
    sleep: Mutex<()>,
    wake: Condvar,
    /// Tries before a worker yields.
    num_spins: u32,
}

// SAFETY: `job` is the only member that is not `Sync` by itself. The caller writes it only while the operator
// is closed and no worker is inside, workers read it only inside, and `state` orders the two.
// The pointer in it is to a `Sync` closure that outlives the operator.
unsafe impl Sync for Shared {}
// SAFETY: As for `Sync`; nothing in it belongs to a thread.
unsafe impl Send for Shared {}

fn epoch_of(state: u64) -> u64 {
    state >> EPOCH_SHIFT
}

impl Shared {
    /// Take chunks of `job` until none is left. A panic ends the operator and is kept for the caller.
    fn run_chunks(&self, job: Job, worker: usize) {
        // SAFETY: The caller of `Pool::run` keeps the closure alive until no worker is inside.
        let body = unsafe { &*job.body };
        let result = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let chunk = self.next_chunk.fetch_add(1, Ordering::Relaxed);
                if chunk >= job.num_chunks {
                    break;
                }
                body(worker, chunk);
            }
        }));
        if let Err(payload) = result {
            self.next_chunk.store(job.num_chunks, Ordering::Relaxed);
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
        }
    }

    /// A worker's life: wait for the next operator, help, repeat until told to stop.
    fn work(&self, worker: usize) {
        let mut last_epoch = 0;
        loop {
            let state = self.wait_for_news(last_epoch);
            if state & STOP != 0 {
                return;
            }
            last_epoch = epoch_of(state);
            self.join(last_epoch, worker);
        }
    }

    /// Help with operator `epoch`, unless it is closed already.
    fn join(&self, epoch: u64, worker: usize) {
        let mut state = self.state.load(Ordering::Relaxed);
        while epoch_of(state) == epoch && state & OPEN != 0 {
            // Acquire: the job was written before the state that this replaces.
            match self.state.compare_exchange_weak(state, state + 1, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => {
                    // SAFETY: This worker is inside, so the caller does not write the job.
                    let job = self.job.with(|job| unsafe { *job });
                    if let Some(job) = job {
                        self.run_chunks(job, worker);
                    }
                    // Release: what the chunks wrote is seen by the caller that reads the count.
                    self.state.fetch_sub(1, Ordering::Release);
                    return;
                }
                Err(found) => state = found,
            }
        }
    }

    /// Wait until the epoch is not `last_epoch` or the pool stops; returns the state seen.
    fn wait_for_news(&self, last_epoch: u64) -> u64 {
        let is_news = |state: u64| epoch_of(state) != last_epoch || state & STOP != 0;
        for attempt in 0..self.num_spins + NUM_YIELDS {
            let state = self.state.load(Ordering::Acquire);
            if is_news(state) {
                return state;
            }
            if attempt < self.num_spins { spin_loop() } else { thread::yield_now() }
        }
        let mut asleep = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
        self.num_parked.fetch_add(1, Ordering::Relaxed);
        // With the fence in `notify`: either this worker sees the new state, or the caller sees it parked.
        fence(Ordering::SeqCst);
        let state = loop {
            let state = self.state.load(Ordering::Acquire);
            if is_news(state) {
                break state;
            }
            asleep = self.wake.wait(asleep).unwrap_or_else(PoisonError::into_inner);
        };
        self.num_parked.fetch_sub(1, Ordering::Relaxed);
        state
    }

    /// Wake parked workers after `state` has changed.
    fn notify(&self) {
        fence(Ordering::SeqCst);
        if self.num_parked.load(Ordering::Relaxed) > 0 {
            let _asleep = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
            self.wake.notify_all();
        }
    }

    /// Wait until no worker is inside a closed operator.
    fn wait_until_empty(&self) {
        let mut attempt = 0;
        // Acquire: pairs with the release by which a worker counts itself out.
        while self.state.load(Ordering::Acquire) & INSIDE != 0 {
            if attempt < self.num_spins {
                attempt += 1;
                spin_loop();
            } else {
                thread::yield_now();
            }
        }
    }
}

/// The calling thread and its workers.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<thread::JoinHandle<()>>,
}

impl Pool {
    /// A pool of `num_threads`, the caller's counted in, or of fewer where the system refuses a thread. Each worker first calls `on_start(worker)`, where
    /// `worker` is in `1..num_threads`. Workers of a `crowded` pool, one with more threads than CPUs, do not spin.
    pub(crate) fn new(num_threads: usize, crowded: bool, on_start: impl Fn(usize) + Send + Sync + 'static) -> Pool {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            next_chunk: AtomicUsize::new(0),
            num_parked: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            panic: Mutex::new(None),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            num_spins: if crowded { 0 } else { NUM_SPINS },
        });
        let on_start = Arc::new(on_start);
        let workers = (1..num_threads)
            .map_while(|worker| {
                let (shared, on_start) = (Arc::clone(&shared), Arc::clone(&on_start));
                let work = move || {
                    on_start(worker);
                    shared.work(worker);
                };
                thread::Builder::new().spawn(work).ok()
            })
            .collect();
        Pool { shared, workers }
    }

    /// Threads that there are, the caller's counted in.
    pub(crate) fn num_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Call `body(worker, chunk)` once for each chunk below `num_chunks`, on any worker; the caller is worker 0.
    /// Takes `&mut self` because operators of one pool must not overlap.
    ///
    /// # Panics
    /// With the panic of a chunk, once no worker is inside any more.
    pub(crate) fn run(&mut self, num_chunks: usize, body: &(dyn Fn(usize, usize) + Sync)) {
        if num_chunks <= 1 || self.workers.is_empty() {
            for chunk in 0..num_chunks {
                body(0, chunk);
            }
            return;
        }
        let shared = &*self.shared;
        // SAFETY: Only the lifetime changes; this function returns after the last use by any worker.
        let body: *const (dyn Fn(usize, usize) + Sync + 'static) = unsafe { std::mem::transmute(body) };
        let job = Job { body, num_chunks };
        // SAFETY: The last operator is closed and empty, so no worker reads the job.
        shared.job.with_mut(|place| unsafe { *place = Some(job) });
        shared.next_chunk.store(0, Ordering::Relaxed);
        let epoch = epoch_of(shared.state.load(Ordering::Relaxed)).wrapping_add(1);
        // Release: a worker that joins sees the job and the counter.
        shared.state.store(epoch << EPOCH_SHIFT | OPEN, Ordering::Release);
        shared.notify();
        shared.run_chunks(job, 0);
        shared.state.fetch_and(!OPEN, Ordering::Relaxed);
        shared.wait_until_empty();
        let payload = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(payload) = payload {
            resume_unwind(payload);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.state.fetch_or(STOP, Ordering::Release);
        self.shared.notify();
        for worker in self.workers.drain(..) {
            // A worker does not panic: its chunks' panics are caught.
            let _ = worker.join();
        }
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::Pool;
    use loom::cell::UnsafeCell;
    use loom::sync::atomic::{AtomicUsize, Ordering};

    /// A number that only the pool's own ordering keeps from data races, which loom reports.
    struct Unguarded(UnsafeCell<usize>);

    // SAFETY: The model checks that accesses do not overlap.
    unsafe impl Sync for Unguarded {}

    impl Unguarded {
        fn add_one(&self) {
            // SAFETY: Chunk 0 runs once, and the caller reads after the operator.
            self.0.with_mut(|value| unsafe { *value += 1 });
        }
    }

    /// Explore every interleaving of `num_operators` operators of two chunks on `num_threads`, with at most
    /// `preemptions` forced switches; each chunk must run exactly once and be seen by the caller.
    fn check(num_threads: usize, num_operators: usize, preemptions: usize) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(preemptions);
        model.check(move || {
            let mut pool = Pool::new(num_threads, false, |_| {});
            for _ in 0..num_operators {
                // Relaxed: only the pool's own ordering makes the counts visible.
                let counts = [AtomicUsize::new(0), AtomicUsize::new(0)];
                let written = Unguarded(UnsafeCell::new(0));
                pool.run(2, &|_, chunk| {
                    counts[chunk].fetch_add(1, Ordering::Relaxed);
                    if chunk == 0 {
                        written.add_one();
                    }
                });
                assert_eq!(counts.map(|count| count.load(Ordering::Relaxed)), [1, 1]);
                // SAFETY: The operator is over.
                assert_eq!(written.0.with(|value| unsafe { *value }), 1);
            }
        });
    }

    #[test]
    fn loom_each_chunk_runs_once_with_one_worker_and_two_operators() {
        check(2, 2, 3);
    }

    #[test]
    fn loom_each_chunk_runs_once_with_two_workers() {
        check(3, 1, 2);
    }
}
