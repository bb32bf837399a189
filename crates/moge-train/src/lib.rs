//! Training: forward that keeps activations, explicit backward, optimiser, data, checkpoints.

mod batch;
mod checkpoint;
mod config;
mod data;
mod init;
mod metrics;
mod network;
mod params;
mod report;
mod schedule;
mod session;
#[cfg(test)]
mod testing;
mod trainer;

pub use batch::TokenBatch;
pub use checkpoint::{Checkpoints, CheckpointsError, CorruptCheckpoint, Resumed, load_weights};
pub use config::{
    ComputeConfig, Init, LossConfig, OptimizerConfig, OutputConfig, PhaseConfig, RunConfig, RunConfigError, RunModel,
    SourceConfig, SourceFormat,
};
pub use data::{DataError, DataLoader, DataProgress, DataState, SourceSummary, TokenFile};
pub use init::initial_weights;
pub use metrics::{MetricsError, MetricsLog, StepMetrics, read_metrics};
pub use network::{Batch, LossScales, Losses, MAX_ROWS, RoutingLosses, TrainMemory, TrainNetwork, Workspace};
pub use params::{Layout, ParamTensor};
pub use report::{Report, ReportError};
pub use schedule::Schedule;
pub use session::{LastCheckpoint, Outcome, OutputError, Session, SessionError};
pub use trainer::{Optimizer, StepLosses, TrainError, TrainState, Trainer};
