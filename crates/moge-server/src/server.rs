//! The life of a server: listening, loading, serving, draining.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use moge_engine::Engine;
use moge_model::Cpu;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinHandle;

use crate::app::{App, AppState, Phase, ServedModel, ServerConfig, Serving};
use crate::engine_thread::EngineHandle;
use crate::listen::listen;
use crate::metrics::Metrics;
use crate::middleware;
use crate::routes::router;
use crate::serve_error::ServeError;
use crate::structured::markers::GrammarMarkers;

/// Threads for HTTP. They have little to do, and the model needs the processors.
const NUM_HTTP_THREADS: usize = 2;

/// Threads that render, tokenise and compile grammars.
const MAX_BLOCKING_THREADS: usize = 8;

/// Time for ended streams to send their last events.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// A server that listens. Until it has a model it only says that it lives.
pub struct Server {
    runtime: Runtime,
    state: AppState,
    address: SocketAddr,
    listening: JoinHandle<()>,
}

impl Server {
    /// Listen. `abort` ends the process when it is told to stop before there is a model.
    ///
    /// # Errors
    /// If the address cannot be bound, an origin is not valid, or the system cannot start threads.
    pub fn start(config: ServerConfig, abort: impl FnOnce() + Send + 'static) -> Result<Server, ServeError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(NUM_HTTP_THREADS)
            .max_blocking_threads(MAX_BLOCKING_THREADS)
            .thread_name("http")
            .enable_all()
            .build()?;
        let address = config.address;
        let cors = middleware::cors(&config.cors_origins)?;
        let state = Arc::new(App::new(config));
        let _guard = runtime.enter();
        let signals = [signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?];
        let listener = runtime.block_on(TcpListener::bind(address));
        let listener = listener.map_err(|source| ServeError::Listen { address, source })?;
        let address = listener.local_addr()?;
        runtime.spawn(obey(signals, state.clone(), abort));
        let router = middleware::wrap(router(state.clone()), &state, cors);
        let listening = runtime.spawn(listen(listener, router, state.clone()));
        drop(_guard);
        Ok(Server { runtime, state, address, listening })
    }

    /// The address it listens at.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serve `model` with an engine that computes on `cpu`, until the process is told to stop and all requests have ended.
    /// Calls `ready` when requests are answered.
    ///
    /// # Errors
    /// If the engine fails.
    pub fn run(self, engine: Engine, cpu: Cpu, model: ServedModel, ready: impl FnOnce()) -> Result<(), ServeError> {
        let Server { runtime, state, mut listening, .. } = self;
        let metrics = Arc::new(Metrics::new(&model.name));
        let (engine, thread) = EngineHandle::start(engine, cpu, Arc::clone(&metrics))?;
        let kept_up = Arc::clone(&metrics);
        runtime.spawn(async move { kept_up.keep_up().await });
        let markers = GrammarMarkers::new(model.config.architecture, |text| model.tokenizer.id_of(text));
        state.serve(Serving { model, markers, engine: engine.clone(), metrics });
        ready();
        let failed = runtime.block_on(async {
            let mut phases = state.phases();
            tokio::select! {
                _ = &mut listening => false,
                () = Phase::Ending.reached(&mut phases) => {
                    // The connections end with their streams, and those with the step that runs, which may be long.
                    let ended = async { engine.end_all().await; (&mut listening).await };
                    let _ = tokio::time::timeout(LAST_WORDS, ended).await;
                    false
                }
                () = engine.failed() => {
                    state.enter(Phase::Ending);
                    let _ = tokio::time::timeout(LAST_WORDS, &mut listening).await;
                    true
                }
            }
        });
        runtime.shutdown_timeout(LAST_WORDS);
        drop(engine);
        drop(state);
        // The thread ends when the last handle is gone; a stuck connection may still hold one.
        if failed && thread.join().is_err() {
            return Err(ServeError::EngineFailed);
        }
        Ok(())
    }
}

/// Drain at the first signal and end at the second, or when the time to drain is over.
async fn obey(mut signals: [Signal; 2], state: AppState, abort: impl FnOnce()) {
    received(&mut signals).await;
    if state.loaded().is_none() {
        return abort();
    }
    let drain_time = state.config.drain_time;
    tracing::info!("stopping: no new requests; those that run have {} s", drain_time.as_secs());
    state.enter(Phase::Draining);
    tokio::select! {
        () = tokio::time::sleep(drain_time) => tracing::warn!("the time to drain is over"),
        () = received(&mut signals) => tracing::warn!("stopping at once"),
    }
    state.enter(Phase::Ending);
}

async fn received([terminate, interrupt]: &mut [Signal; 2]) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}
