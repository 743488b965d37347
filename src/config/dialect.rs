//! What each server software understands of OpenAI's API, by table.
//!
//! Sources: answers of vLLM 0.32 and llama.cpp's server recorded on the wire, the request types in the
//! sources of SGLang, Ollama and Text Generation Inference, and Ollama's page on OpenAI compatibility. All of
//! them ignore members that they do not know, so an unknown member never fails a call, and may change its
//! meaning: those are refused here, and the call goes to the API.

use std::collections::BTreeMap;

use super::{Dialect, Features, ParameterRule};

/// The software of a self-hosted server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Server {
    #[default]
    Vllm,
    Sglang,
    /// Hugging Face's Text Generation Inference.
    Tgi,
    LlamaCpp,
    Ollama,
    /// Anything else that speaks OpenAI's chat completions.
    Other,
}

/// Members whose meaning needs `OpenAI`'s own machinery: tools that it runs, conversations that it stores.
const NEEDS_OPENAI: [&str; 3] = ["web_search_options", "previous_response_id", "conversation"];

const ALL_FEATURES: Features = Features {
    tools: true,
    json_schema: true,
    vision: true,
    audio: true,
    logprobs: true,
    multiple_choices: true,
    embeddings: true,
    responses: true,
};

const PLAIN_CHAT: Features = Features {
    tools: false,
    json_schema: false,
    vision: false,
    audio: false,
    logprobs: false,
    multiple_choices: false,
    embeddings: false,
    responses: false,
};

/// Features of an offer on an `api` backend.
pub const fn api_features() -> Features {
    ALL_FEATURES
}

impl Server {
    /// Path of the health check below the host; none when the server has no such thing of its own.
    pub fn health_path(self) -> Option<&'static str> {
        match self {
            Self::Vllm | Self::Sglang | Self::Tgi | Self::LlamaCpp => Some("/health"),
            Self::Ollama => Some("/api/version"),
            Self::Other => None,
        }
    }

    /// Path of the server's own metrics below the host.
    pub fn metrics_path(self) -> Option<&'static str> {
        match self {
            Self::Vllm | Self::Sglang | Self::Tgi | Self::LlamaCpp => Some("/metrics"),
            Self::Ollama | Self::Other => None,
        }
    }

    /// What an offer supports when its owner says nothing. Tools need flags at the server's start, and images
    /// need a model that sees, so both are off: a call that needs them goes to the API instead of failing.
    pub fn features(self) -> Features {
        let served = PLAIN_CHAT;
        match self {
            Self::Vllm => Features {
                json_schema: true,
                logprobs: true,
                multiple_choices: true,
                responses: true,
                ..served
            },
            Self::Sglang | Self::LlamaCpp => {
                Features { json_schema: true, logprobs: true, multiple_choices: true, ..served }
            }
            Self::Tgi => Features { logprobs: true, ..served },
            Self::Ollama => Features { json_schema: true, ..served },
            Self::Other => served,
        }
    }

    pub(super) fn dialect(self) -> Dialect {
        let mut parameters: BTreeMap<String, ParameterRule> =
            NEEDS_OPENAI.iter().map(|name| ((*name).to_owned(), ParameterRule::Refuse)).collect();
        let own: &[(&str, ParameterRule)] = &match self {
            Self::Vllm | Self::Sglang | Self::LlamaCpp | Self::Other => vec![],
            // Ignored, so the answer would be longer, or differently biased, than asked for.
            Self::Tgi | Self::Ollama => vec![
                ("max_completion_tokens", ParameterRule::Rename("max_tokens".to_owned())),
                ("logit_bias", ParameterRule::Refuse),
            ],
        };
        parameters.extend(own.iter().map(|(name, rule)| ((*name).to_owned(), rule.clone())));
        Dialect { parameters, no_stream_options: false, usage_per_choice: self == Self::LlamaCpp }
    }
}
