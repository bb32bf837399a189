//! State shared by all routes.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use moge_engine::{Grammar, GrammarCompiler, SamplingParams};
use moge_model::{ChatTemplate, ChatTemplateError, GenerationDefaults, ModelConfig, Tokenizer};
use tokio::sync::watch;

use crate::clock::unix_seconds;
use crate::engine_thread::EngineHandle;
use crate::error::ApiError;
use crate::expert_ids::ExpertIds;
use crate::metrics::Metrics;
use crate::structured::markers::GrammarMarkers;

/// Address and limits of a server.
#[derive(Clone)]
pub struct ServerConfig {
    /// Address to listen at; port 0 takes a free port.
    pub address: SocketAddr,
    /// Accepted API keys; if empty, no key is required.
    pub api_keys: Vec<String>,
    /// Origins whose pages may call the server, beside its own; `*` is every one.
    pub cors_origins: Vec<String>,
    /// Longest body of a request.
    pub max_body_bytes: usize,
    /// Connections at a time; further ones get status 503, but for `/health`.
    pub max_connections: usize,
    /// Most answers that one request may ask for, over all its prompts.
    pub max_answers: usize,
    /// Longest time of a request, including its time in the queue.
    pub max_request_time: Duration,
    /// Time that running requests have after the server is told to stop.
    pub drain_time: Duration,
}

/// The model and its files.
pub struct ServedModel {
    /// The name that clients give.
    pub name: String,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// Its chat template, or the error of loading it.
    pub chat_template: Result<ChatTemplate, ChatTemplateError>,
    /// Sampling parameters where a request has none.
    pub defaults: GenerationDefaults,
    /// The network.
    pub config: ModelConfig,
    /// Longest sequence, prompt and answer together.
    pub max_model_len: usize,
    /// Makes the grammars of structured output.
    pub grammars: GrammarCompiler,
}

impl ServedModel {
    /// For an answer that is to say which experts it took; `None` for others, and for a dense model.
    pub(crate) fn expert_ids(&self, params: &SamplingParams) -> Option<ExpertIds> {
        if params.return_expert_ids { ExpertIds::new(&self.config) } else { None }
    }

    /// Compile the grammar that `field` asks for; `lark` is `None` if the answer is not restricted.
    ///
    /// # Errors
    /// If the grammar is not valid, or exceeds a limit.
    pub(crate) fn compile(&self, field: &'static str, lark: Option<String>) -> Result<Option<Grammar>, ApiError> {
        let compiled = lark.map(|lark| self.grammars.compile(&lark)).transpose();
        compiled.map_err(|error| ApiError::grammar(field, &error))
    }
}

/// A model that answers.
pub(crate) struct Serving {
    pub(crate) model: ServedModel,
    /// The marks around the model's thinking and tool calls.
    pub(crate) markers: GrammarMarkers,
    pub(crate) engine: EngineHandle,
    pub(crate) metrics: Arc<Metrics>,
}

impl Serving {
    /// Refuse a request for another model. Without a name the one that is served answers.
    ///
    /// # Errors
    /// If it has another name.
    pub(crate) fn check_name(&self, name: Option<&str>) -> Result<(), ApiError> {
        match name {
            Some(name) if name != self.model.name => Err(ApiError::UnknownModel(name.to_owned())),
            _ => Ok(()),
        }
    }
}

/// Phase of the server's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// The model is being loaded, or answers.
    Running,
    /// New requests are refused, those that run may end.
    Draining,
    /// Everything ends now.
    Ending,
}

impl Phase {
    /// Wait until the server has reached this phase.
    pub(crate) async fn reached(self, phases: &mut watch::Receiver<Phase>) {
        // An error means that the server is gone.
        let _ = phases.wait_for(|phase| *phase >= self).await;
    }
}

/// Shared by all requests.
pub(crate) type AppState = Arc<App>;

/// A server, with a model or before it has one.
pub(crate) struct App {
    pub(crate) config: ServerConfig,
    /// Set when the model is loaded.
    serving: OnceLock<Arc<Serving>>,
    phase: watch::Sender<Phase>,
    /// Seconds since 1970.
    pub(crate) started: u64,
    random: RandomState,
    num_ids: AtomicU64,
}

impl App {
    /// A server that has no model yet.
    pub(crate) fn new(config: ServerConfig) -> App {
        App {
            config,
            serving: OnceLock::new(),
            phase: watch::Sender::new(Phase::Running),
            started: unix_seconds(),
            random: RandomState::new(),
            num_ids: AtomicU64::new(0),
        }
    }

    /// Start serving the loaded model.
    pub(crate) fn serve(&self, serving: Serving) {
        // Only the one owner of the server calls this, once.
        let _ = self.serving.set(Arc::new(serving));
    }

    /// The model.
    ///
    /// # Errors
    /// If it is not loaded yet, or the server takes no new requests.
    pub(crate) fn serving(&self) -> Result<&Arc<Serving>, ApiError> {
        if *self.phase.borrow() != Phase::Running {
            return Err(ApiError::Unavailable("the server is shutting down"));
        }
        self.serving.get().ok_or(ApiError::Unavailable("the model is being loaded"))
    }

    /// The model, also while the server drains.
    pub(crate) fn loaded(&self) -> Option<&Arc<Serving>> {
        self.serving.get()
    }

    /// Go on to a later phase; earlier ones never come back.
    pub(crate) fn enter(&self, phase: Phase) {
        self.phase.send_if_modified(|current| {
            let is_later = phase > *current;
            *current = phase.max(*current);
            is_later
        });
    }

    /// Tells of changes of the phase.
    pub(crate) fn phases(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// An unpredictable number, different for each `salt`.
    pub(crate) fn random(&self, salt: u64) -> u64 {
        let mut hasher = self.random.build_hasher();
        hasher.write_u64(salt);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        hasher.write_u128(now.as_nanos());
        hasher.finish()
    }

    /// A new id, `prefix` and 24 digits.
    pub(crate) fn new_id(&self, prefix: &str) -> String {
        let number = self.num_ids.fetch_add(1, Ordering::Relaxed);
        format!("{prefix}{:016x}{number:08x}", self.random(number))
    }
}
