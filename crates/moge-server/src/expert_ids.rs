//! The experts that an answer's tokens took, as clients get them.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use moge_model::ModelConfig;
use serde_json::{Map, Value, json};

/// The experts that an answer's tokens took, while they are computed.
#[derive(Debug)]
pub(crate) struct ExpertIds {
    ids: Vec<u8>,
    /// Ids of a token, `[routed layer, expert group, top_k_per_group]`.
    token_shape: [usize; 3],
}

impl ExpertIds {
    /// For a model with routed experts; `None` for others.
    pub(crate) fn new(config: &ModelConfig) -> Option<ExpertIds> {
        let moe = config.moe()?;
        let token_shape = [config.num_routed_layers(), moe.num_expert_groups(), moe.top_k_per_group()];
        Some(ExpertIds { ids: Vec::new(), token_shape })
    }

    /// Take in a step's.
    pub(crate) fn push(&mut self, ids: &[u8]) {
        self.ids.extend_from_slice(ids);
    }

    /// Fields `expert_ids` and `expert_ids_shape` of a choice.
    pub(crate) fn write(&self, choice: &mut Map<String, Value>) {
        let [layers, groups, experts] = self.token_shape;
        let num_tokens = self.ids.len() / (layers * groups * experts).max(1);
        choice.insert("expert_ids".to_owned(), BASE64_STANDARD.encode(&self.ids).into());
        choice.insert("expert_ids_shape".to_owned(), json!([num_tokens, layers, groups, experts]));
    }
}
