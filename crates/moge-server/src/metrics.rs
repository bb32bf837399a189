//! Prometheus metrics. Series with the same meaning as vLLM's have the same names, so that its dashboards work.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use metrics::{Counter, Gauge, Histogram, Key, Label, Level, Metadata, Recorder, SharedString};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use moge_engine::{Engine, ExpertLoad, FinishReason, SequenceOutput};
use serde_json::{Value, json};

/// Bounds of the histograms of seconds: vLLM's for the first token and for the whole request.
const SECONDS: [f64; 20] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 160.0,
    640.0,
];

/// Interval at which records are moved into the histograms.
const UPKEEP: Duration = Duration::from_secs(5);

/// Layer bands that expert load is shown for, at most.
const MAX_BANDS: usize = 4;

const METADATA: Metadata<'static> = Metadata::new("moge", Level::INFO, None);

/// All series of one server.
pub(crate) struct Metrics {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
    model: Label,
    running: Gauge,
    waiting: Gauge,
    kv_usage: Gauge,
    preemptions: Counter,
    prefix_queries: Counter,
    prefix_hits: Counter,
    prompt_tokens: Counter,
    generation_tokens: Counter,
    first_token: Histogram,
    inter_token: Histogram,
    per_output_token: Histogram,
    queue: Histogram,
    whole: Histogram,
    /// Of the last step, for those who ask between steps.
    expert_load: Mutex<Option<ExpertLoad>>,
}

/// Times of the events of one sequence.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RequestTimes {
    arrival: Instant,
    num_prompt_tokens: usize,
    /// True if a step has included the sequence.
    has_started: bool,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    num_tokens: u32,
}

impl RequestTimes {
    /// A request that arrived at `arrival`.
    pub(crate) fn new(arrival: Instant, num_prompt_tokens: usize) -> RequestTimes {
        RequestTimes {
            arrival,
            num_prompt_tokens,
            has_started: false,
            first_token: None,
            last_token: None,
            num_tokens: 0,
        }
    }
}

impl Metrics {
    /// For a server of the model `name`.
    pub(crate) fn new(name: &str) -> Metrics {
        let builder = PrometheusBuilder::new().set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS);
        // The bounds are a constant that is not empty, which is all that can be wrong with them.
        let builder = builder.unwrap_or_else(|_| PrometheusBuilder::new());
        let recorder = builder.build_recorder();
        let model = Label::new("model_name", name.to_owned());
        let key = |name: &'static str| Key::from_parts(name, vec![model.clone()]);
        let describe = |name: &'static str, text: &'static str| (name, SharedString::const_str(text));
        let gauge = |name, text| {
            let (name, text) = describe(name, text);
            recorder.describe_gauge(name.into(), None, text);
            recorder.register_gauge(&key(name), &METADATA)
        };
        let counter = |name, text| {
            let (name, text) = describe(name, text);
            recorder.describe_counter(name.into(), None, text);
            recorder.register_counter(&key(name), &METADATA)
        };
        let histogram = |name, text| {
            let (name, text) = describe(name, text);
            recorder.describe_histogram(name.into(), None, text);
            recorder.register_histogram(&key(name), &METADATA)
        };
        describe_labelled(&recorder);
        Metrics {
            running: gauge("vllm:num_requests_running", "Sequences that run"),
            waiting: gauge("vllm:num_requests_waiting", "Sequences that wait to run"),
            kv_usage: gauge("vllm:kv_cache_usage_perc", "Share of KV blocks that sequences hold, from 0 to 1"),
            preemptions: counter(
                "vllm:num_preemptions_total",
                "Times that a sequence gave its KV blocks to an older one",
            ),
            prefix_queries: counter("vllm:prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache"),
            prefix_hits: counter("vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache"),
            prompt_tokens: counter("vllm:prompt_tokens_total", "Prompt tokens of sequences that began to run"),
            generation_tokens: counter("vllm:generation_tokens_total", "Tokens sampled"),
            first_token: histogram("vllm:time_to_first_token_seconds", "From arrival to the first token"),
            inter_token: histogram("vllm:inter_token_latency_seconds", "From a token to the next"),
            per_output_token: histogram(
                "vllm:request_time_per_output_token_seconds",
                "Mean time of a sequence's tokens after its first",
            ),
            queue: histogram("vllm:request_queue_time_seconds", "From arrival to the start of the first step for it"),
            whole: histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token"),
            handle: recorder.handle(),
            recorder,
            model,
            expert_load: Mutex::default(),
        }
    }

    /// The metrics in Prometheus' text format.
    pub(crate) fn render(&self) -> String {
        self.describe_experts();
        self.handle.render()
    }

    /// Move records into the histograms at intervals, without end: until then every record takes memory.
    pub(crate) async fn keep_up(&self) {
        let mut interval = tokio::time::interval(UPKEEP);
        loop {
            interval.tick().await;
            self.handle.run_upkeep();
        }
    }

    /// A step is over.
    pub(crate) fn step(&self, engine: &Engine) {
        let stats = engine.stats();
        self.running.set(stats.num_running as f64);
        self.waiting.set(stats.num_waiting as f64);
        let num_held = stats.num_blocks - stats.num_free_blocks;
        self.kv_usage.set(num_held as f64 / stats.num_blocks.max(1) as f64);
        self.preemptions.absolute(stats.num_preemptions);
        self.prefix_queries.absolute(stats.num_prompt_tokens_looked_up);
        self.prefix_hits.absolute(stats.num_prompt_tokens_cached);
        let mut expert_load = self.expert_load.lock().unwrap_or_else(PoisonError::into_inner);
        match (&mut *expert_load, engine.expert_load()) {
            (Some(known), Some(load)) => known.counts.copy_from_slice(&load.counts),
            (known, load) => *known = load.cloned(),
        }
    }

    /// The step that began at `step_start` had a result for a sequence.
    pub(crate) fn output(&self, times: &mut RequestTimes, output: &SequenceOutput, step_start: Instant) {
        let now = Instant::now();
        if !times.has_started {
            times.has_started = true;
            self.queue.record(step_start - times.arrival);
            self.prompt_tokens.increment(times.num_prompt_tokens as u64);
        }
        self.generation_tokens.increment(output.sampled.len() as u64);
        for _ in &output.sampled {
            match times.last_token {
                None => self.first_token.record(now - times.arrival),
                // 0 between tokens of one step.
                Some(last) => self.inter_token.record(now - last),
            }
            times.first_token.get_or_insert(now);
            times.last_token = Some(now);
            times.num_tokens += 1;
        }
    }

    /// A sequence has ended.
    pub(crate) fn finished(&self, times: &RequestTimes, reason: FinishReason) {
        self.whole.record(times.arrival.elapsed());
        if let (Some(first), Some(last)) = (times.first_token, times.last_token)
            && times.num_tokens > 1
        {
            self.per_output_token.record((last - first) / (times.num_tokens - 1));
        }
        let reason = match reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Cancelled => "abort",
            _ => "error",
        };
        let labels = vec![self.model.clone(), Label::new("finished_reason", reason)];
        self.recorder.register_counter(&Key::from_parts("vllm:request_success_total", labels), &METADATA).increment(1);
    }

    /// An HTTP request was answered.
    pub(crate) fn answered(&self, route: &str, status: u16, time: Duration) {
        let route = Label::new("handler", route.to_owned());
        let labels = vec![route.clone(), Label::new("status", status.to_string())];
        self.recorder.register_counter(&Key::from_parts("http_requests_total", labels), &METADATA).increment(1);
        let key = Key::from_parts("http_request_duration_seconds", vec![route]);
        self.recorder.register_histogram(&key, &METADATA).record(time);
    }

    /// Tokens of each expert since the start, in bands of layers.
    pub(crate) fn expert_load(&self) -> Value {
        let load = self.expert_load.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(load) = &*load else {
            return json!({ "num_expert_groups": 0, "experts_per_group": 0, "bands": [] });
        };
        let bands: Vec<Value> = bands(load)
            .map(|band| {
                let groups: Vec<&[u64]> = band.tokens.chunks(load.experts_per_group).collect();
                json!({ "first_layer": band.first_layer, "last_layer": band.last_layer, "tokens": groups })
            })
            .collect();
        json!({
            "num_expert_groups": load.num_expert_groups,
            "experts_per_group": load.experts_per_group,
            "bands": bands,
        })
    }

    fn describe_experts(&self) {
        let load = self.expert_load.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(load) = &*load else { return };
        for band in bands(load) {
            for (expert, &tokens) in band.tokens.iter().enumerate() {
                let labels = vec![
                    self.model.clone(),
                    Label::new("layers", format!("{}-{}", band.first_layer, band.last_layer)),
                    Label::new("expert_group", (expert / load.experts_per_group).to_string()),
                    Label::new("expert", (expert % load.experts_per_group).to_string()),
                ];
                let key = Key::from_parts("moge:expert_tokens_total", labels);
                self.recorder.register_counter(&key, &METADATA).absolute(tokens);
            }
        }
    }
}

/// Describe the series that are registered with their first values, when their labels are known.
fn describe_labelled(recorder: &PrometheusRecorder) {
    let counters = [
        ("vllm:request_success_total", "Sequences that ended, by reason: stop, length, abort, error"),
        ("http_requests_total", "HTTP requests, by path and status"),
        ("moge:expert_tokens_total", "Tokens that an expert computed, in a band of layers"),
    ];
    for (name, text) in counters {
        recorder.describe_counter(name.into(), None, SharedString::const_str(text));
    }
    let text = "From an HTTP request's head to its answer's head";
    recorder.describe_histogram("http_request_duration_seconds".into(), None, SharedString::const_str(text));
}

/// A range of consecutive layers.
struct Band {
    first_layer: usize,
    last_layer: usize,
    /// Tokens that each expert got, `[num_experts]`.
    tokens: Vec<u64>,
}

fn bands(load: &ExpertLoad) -> impl Iterator<Item = Band> {
    let num_experts = load.num_expert_groups * load.experts_per_group;
    let num_layers = load.counts.len() / num_experts;
    let layers_per_band = num_layers.div_ceil(MAX_BANDS).max(1);
    load.counts.chunks(layers_per_band * num_experts).enumerate().map(move |(index, counts)| {
        let mut tokens = vec![0; num_experts];
        for layer in counts.chunks(num_experts) {
            tokens.iter_mut().zip(layer).for_each(|(sum, count)| *sum += count);
        }
        let first_layer = index * layers_per_band;
        Band { first_layer, last_layer: first_layer + counts.len() / num_experts - 1, tokens }
    })
}
