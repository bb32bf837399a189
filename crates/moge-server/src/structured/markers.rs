//! The marks of thinking and tool calls in grammars.

use moge_model::{Architecture, TokenId, ToolFormat, thinking_delimiters};

use super::lark::string;

/// A model's marks of thinking and tool calls, for grammars.
#[derive(Clone, Debug)]
pub(crate) struct GrammarMarkers {
    pub(super) architecture: Architecture,
    pub(super) tool_format: ToolFormat,
    pub(super) thinking_open: Marker,
    pub(super) thinking_close: Marker,
    pub(super) tool_open: Marker,
    pub(super) tool_close: Option<Marker>,
}

/// A marker is a token of its own where the tokenizer has one, otherwise text.
#[derive(Clone, Debug)]
pub(super) enum Marker {
    Token(TokenId),
    Text(&'static str),
}

impl Marker {
    /// As a grammar has it.
    pub(super) fn lark(&self) -> String {
        match self {
            Marker::Token(TokenId(id)) => format!("<[{id}]>"),
            Marker::Text(text) => string(text),
        }
    }
}

impl GrammarMarkers {
    /// The markers of a network; `id_of` is the tokenizer's token for exactly this text.
    pub(crate) fn new(architecture: Architecture, id_of: impl Fn(&str) -> Option<TokenId>) -> GrammarMarkers {
        let marker = |text| id_of(text).map_or(Marker::Text(text), Marker::Token);
        let (thinking_open, thinking_close) = thinking_delimiters(architecture);
        let tool_format = architecture.tool_format();
        GrammarMarkers {
            architecture,
            tool_format,
            thinking_open: marker(thinking_open),
            thinking_close: marker(thinking_close),
            tool_open: marker(tool_format.open()),
            tool_close: tool_format.close().map(marker),
        }
    }
}
