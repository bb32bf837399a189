//! The thread that owns the engine, and how the rest of the server talks to it.
//!
//! Requests come through a bounded channel between two steps; what a step gives goes out through the channel of each
//! request, which holds no more than the tokens that the request may have. So no client, however slow, holds up a step.
//! A request whose receiver is gone is cancelled before the next step.

use std::collections::HashMap;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use moge_engine::{AdmitError, Engine, FinishReason, Request, SeqId, SequenceOutput};
use moge_model::Cpu;
use tokio::sync::{mpsc, oneshot};

use crate::error::ApiError;
use crate::metrics::{Metrics, RequestTimes};

/// Requests on their way to the engine; more wait with their senders.
const MAX_COMMANDS: usize = 256;

/// An event of one sequence of a request, with its index there: the output of a step, the last of which has a finish
/// reason, or the reason why the server ended it early.
type Event = (usize, Result<Box<SequenceOutput>, ApiError>);

enum Command {
    Add(Submission),
    /// End all that waits and runs.
    EndAll,
}

/// The sequences of one request, which start together.
struct Submission {
    requests: Vec<Request>,
    arrival: Instant,
    time_allowed: Duration,
    events: mpsc::UnboundedSender<Event>,
    reply: oneshot::Sender<Result<(), AdmitError>>,
}

/// Outputs of the sequences of one request. Dropping the stream cancels them.
#[derive(Debug)]
pub(crate) struct ResponseStream {
    events: mpsc::UnboundedReceiver<Event>,
    num_open: usize,
}

impl ResponseStream {
    /// The next event and the index of its sequence; `None` after the last of every sequence.
    ///
    /// # Errors
    /// If the engine has failed, or the server ended a sequence.
    pub(crate) async fn next(&mut self) -> Result<Option<(usize, SequenceOutput)>, ApiError> {
        if self.num_open == 0 {
            return Ok(None);
        }
        match self.events.recv().await {
            None => Err(ApiError::Internal("the engine has failed".to_owned())),
            Some((index, output)) => {
                let output = output?;
                self.num_open -= usize::from(output.finish_reason.is_some());
                Ok(Some((index, *output)))
            }
        }
    }
}

/// Submits requests to the engine.
#[derive(Clone)]
pub(crate) struct EngineHandle {
    commands: mpsc::Sender<Command>,
}

impl EngineHandle {
    /// Start the thread. It ends when all handles are gone, or with the engine's panic.
    pub(crate) fn start(
        engine: Engine,
        cpu: Cpu,
        metrics: Arc<Metrics>,
    ) -> std::io::Result<(EngineHandle, JoinHandle<()>)> {
        let (sender, receiver) = mpsc::channel(MAX_COMMANDS);
        let thread = std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || EngineThread { engine, cpu, commands: receiver, active: HashMap::new(), metrics }.run())?;
        Ok((EngineHandle { commands: sender }, thread))
    }

    /// Hand in sequences that have `time_allowed` from now; all of them or none.
    ///
    /// # Errors
    /// If one is refused, or the engine has failed.
    pub(crate) async fn submit(
        &self,
        requests: Vec<Request>,
        time_allowed: Duration,
    ) -> Result<ResponseStream, ApiError> {
        let failed = || ApiError::Internal("the engine has failed".to_owned());
        let (events, receiver) = mpsc::unbounded_channel();
        let (reply, accepted) = oneshot::channel();
        let num_open = requests.len();
        let submission = Submission { requests, arrival: Instant::now(), time_allowed, events, reply };
        self.commands.send(Command::Add(submission)).await.map_err(|_| failed())?;
        accepted.await.map_err(|_| failed())??;
        Ok(ResponseStream { events: receiver, num_open })
    }

    /// Comes back when the engine's thread has ended, which it does by itself only with a panic.
    pub(crate) async fn failed(&self) {
        self.commands.closed().await;
    }

    /// End all that waits and runs.
    pub(crate) async fn end_all(&self) {
        // If the engine is gone, there is nothing to end.
        let _ = self.commands.send(Command::EndAll).await;
    }
}

/// A sequence that waits or runs.
struct ActiveSequence {
    index: usize,
    deadline: Instant,
    time_allowed: Duration,
    events: mpsc::UnboundedSender<Event>,
    times: RequestTimes,
}

struct EngineThread {
    engine: Engine,
    cpu: Cpu,
    commands: mpsc::Receiver<Command>,
    active: HashMap<SeqId, ActiveSequence>,
    metrics: Arc<Metrics>,
}

impl EngineThread {
    fn run(mut self) {
        while self.take_commands() {
            self.end_what_must();
            let start = Instant::now();
            let outputs = self.engine.step(&self.cpu);
            self.metrics.step(&self.engine);
            for output in outputs {
                self.send(output, start);
            }
        }
    }

    /// Process the commands that have arrived, and wait for one if the engine is idle. False when all handles are gone.
    fn take_commands(&mut self) -> bool {
        loop {
            let command = if self.engine.has_unfinished() {
                match self.commands.try_recv() {
                    Ok(command) => command,
                    // With handles or without, running sequences are finished.
                    Err(_) => return true,
                }
            } else {
                self.metrics.step(&self.engine);
                match self.commands.blocking_recv() {
                    Some(command) => command,
                    None => return false,
                }
            };
            match command {
                Command::Add(submission) => self.add(submission),
                Command::EndAll => self.end_where(|_| Some(ApiError::Unavailable("the server is shutting down"))),
            }
        }
    }

    fn add(&mut self, submission: Submission) {
        let Submission { requests, arrival, time_allowed, events, reply } = submission;
        if reply.is_closed() {
            return;
        }
        let mut ids = Vec::with_capacity(requests.len());
        for (index, request) in requests.into_iter().enumerate() {
            let num_prompt_tokens = request.prompt.len();
            match self.engine.add_request(request) {
                Ok(id) => ids.push((id, index, num_prompt_tokens)),
                Err(error) => {
                    ids.iter().for_each(|&(id, ..)| drop(self.engine.cancel(id)));
                    let _ = reply.send(Err(error));
                    return;
                }
            }
        }
        for (id, index, num_prompt_tokens) in ids {
            let times = RequestTimes::new(arrival, num_prompt_tokens);
            let deadline = arrival + time_allowed;
            self.active.insert(id, ActiveSequence { index, deadline, time_allowed, events: events.clone(), times });
        }
        // If the reply's receiver is gone, so is that of the events.
        let _ = reply.send(Ok(()));
    }

    /// Cancel sequences whose client is gone or whose time is over.
    fn end_what_must(&mut self) {
        let now = Instant::now();
        self.end_where(|active| (active.deadline <= now).then_some(ApiError::Deadline(active.time_allowed)));
    }

    /// Cancel sequences whose client is gone, and those for which `why` gives a reason.
    fn end_where(&mut self, why: impl Fn(&ActiveSequence) -> Option<ApiError>) {
        let EngineThread { engine, active, metrics, .. } = self;
        active.retain(|&id, active| {
            let reason = why(active);
            if reason.is_none() && !active.events.is_closed() {
                return true;
            }
            engine.cancel(id);
            metrics.finished(&active.times, FinishReason::Cancelled);
            if let Some(reason) = reason {
                let _ = active.events.send((active.index, Err(reason)));
            }
            false
        });
    }

    /// Hand out the result of the step that began at `step_start`.
    fn send(&mut self, output: SequenceOutput, step_start: Instant) {
        let id = output.id;
        let Some(active) = self.active.get_mut(&id) else { return };
        self.metrics.output(&mut active.times, &output, step_start);
        let finish_reason = output.finish_reason;
        // If the receiver is gone, the next iteration cancels the sequence.
        let _ = active.events.send((active.index, Ok(Box::new(output))));
        if let Some(finish_reason) = finish_reason {
            self.metrics.finished(&active.times, finish_reason);
            self.active.remove(&id);
        }
    }
}
