//! Which of OpenAI's endpoints a request is for.

use http::Method;

/// An endpoint, as far as it is told apart. The name is also a metric label and a column of the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Endpoint {
    ChatCompletions,
    Completions,
    Responses,
    /// A response that is read back.
    Response,
    Embeddings,
    Models,
    Model,
    AudioTranscriptions,
    AudioTranslations,
    AudioSpeech,
    Images,
    Moderations,
    Batches,
    Files,
    Realtime,
    /// Anthropic's `/v1/messages`.
    Messages,
    Other,
}

impl Endpoint {
    /// Those whose calls are read, routed, counted and priced.
    const ROUTED: [Self; 4] = [Self::ChatCompletions, Self::Responses, Self::Embeddings, Self::Completions];

    /// Understands `/v1/..`, and Azure's `/openai/v1/..` and `/openai/deployments/{deployment}/..`.
    /// `path` has no query. Reading back what else is stored (`GET /v1/chat/completions/{id}`) is
    /// [`Endpoint::Other`]: nothing is generated, so nothing may be billed.
    pub fn of(method: &Method, path: &str) -> Self {
        let is_whole_path = |endpoint: &Self| endpoint.path() == Some(path);
        // Nearly all calls are for one of these, which takes a comparison and not a walk over the path.
        if let Some(routed) = Self::ROUTED.into_iter().find(is_whole_path).filter(|_| method == Method::POST)
        {
            return routed;
        }
        let Some(rest) = below_version(path) else { return Self::Other };
        let mut segments = rest.splitn(3, '/');
        let shape = (method.as_str(), segments.next().unwrap_or(""), segments.next(), segments.next());
        match shape {
            ("POST", "chat", Some("completions"), None) => Self::ChatCompletions,
            ("POST", "completions", None, None) => Self::Completions,
            ("POST", "responses", None, None) => Self::Responses,
            ("GET", "responses", Some(id), None) if !id.is_empty() => Self::Response,
            ("POST", "embeddings", None, None) => Self::Embeddings,
            ("GET" | "HEAD", "models", None, None) => Self::Models,
            ("GET" | "HEAD", "models", Some(id), _) if !id.is_empty() => Self::Model,
            ("POST", "audio", Some("transcriptions"), None) => Self::AudioTranscriptions,
            ("POST", "audio", Some("translations"), None) => Self::AudioTranslations,
            ("POST", "audio", Some("speech"), None) => Self::AudioSpeech,
            ("POST", "images", Some("generations" | "edits" | "variations"), None) => Self::Images,
            ("POST", "moderations", None, None) => Self::Moderations,
            (_, "batches", _, _) => Self::Batches,
            (_, "files", _, _) => Self::Files,
            ("GET" | "CONNECT", "realtime", None, None) => Self::Realtime,
            ("POST", "messages", None, None) => Self::Messages,
            _ => Self::Other,
        }
    }

    /// The path of a routed endpoint, which every server that speaks it has.
    pub const fn path(self) -> Option<&'static str> {
        match self {
            Self::ChatCompletions => Some("/v1/chat/completions"),
            Self::Completions => Some("/v1/completions"),
            Self::Responses => Some("/v1/responses"),
            Self::Embeddings => Some("/v1/embeddings"),
            _ => None,
        }
    }

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ChatCompletions => "chat_completions",
            Self::Completions => "completions",
            Self::Responses => "responses",
            Self::Response => "response",
            Self::Embeddings => "embeddings",
            Self::Models => "models",
            Self::Model => "model",
            Self::AudioTranscriptions => "audio_transcriptions",
            Self::AudioTranslations => "audio_translations",
            Self::AudioSpeech => "audio_speech",
            Self::Images => "images",
            Self::Moderations => "moderations",
            Self::Batches => "batches",
            Self::Files => "files",
            Self::Realtime => "realtime",
            Self::Messages => "messages",
            Self::Other => "other",
        }
    }

    /// Whether calls are read, routed, counted and priced. Every other call passes through.
    pub fn is_routed(self) -> bool {
        Self::ROUTED.contains(&self)
    }

    /// Whether an answer may have cost something. Reading back what is stored costs nothing, though the answer
    /// shows the usage of when it was made; a batch is billed when its output file is read, and what was made in the
    /// background when it is read.
    pub fn may_bill(self, method: &Method) -> bool {
        match self {
            Self::Models | Self::Model | Self::Batches => false,
            Self::Files => method == Method::GET,
            Self::Realtime => true,
            _ => method == Method::POST,
        }
    }

    /// Whether an answer that reports no usage has cost something all the same: sound by the character, speech by
    /// the minute, pictures by the piece.
    pub const fn costs_without_usage(self) -> bool {
        matches!(
            self,
            Self::AudioTranscriptions
                | Self::AudioTranslations
                | Self::AudioSpeech
                | Self::Images
                | Self::Messages
        )
    }

    /// Whether a stream of it says its usage only when `stream_options.include_usage` asks for that.
    pub const fn takes_stream_options(self) -> bool {
        matches!(self, Self::ChatCompletions | Self::Completions)
    }
}

/// The deployment in an Azure path, which stands for the model: `/openai/deployments/{deployment}/..`.
pub fn azure_deployment(path: &str) -> Option<&str> {
    path.strip_prefix("/openai/deployments/")?.split('/').next().filter(|name| !name.is_empty())
}

/// What follows the version, or Azure's deployment.
fn below_version(path: &str) -> Option<&str> {
    if let Some(deployment) = path.strip_prefix("/openai/deployments/") {
        return deployment.split_once('/').map(|(_, rest)| rest);
    }
    path.strip_prefix("/openai").unwrap_or(path).strip_prefix("/v1/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_routed_endpoints_are_those_with_a_path_of_their_own() {
        for endpoint in Endpoint::ROUTED {
            let path = endpoint.path().expect("it has one");
            assert_eq!(Endpoint::of(&Method::POST, path), endpoint);
            assert_eq!(Endpoint::of(&Method::GET, path), Endpoint::Other);
        }
        for endpoint in [Endpoint::Messages, Endpoint::Models, Endpoint::Files, Endpoint::Other] {
            assert!(endpoint.path().is_none() && !endpoint.is_routed(), "{endpoint:?}");
        }
    }

    #[test]
    fn an_endpoint_is_known_by_method_and_path() {
        for (method, path, expected) in [
            ("POST", "/v1/chat/completions", Endpoint::ChatCompletions),
            ("POST", "/openai/v1/chat/completions", Endpoint::ChatCompletions),
            ("POST", "/openai/deployments/gpt-4o/chat/completions", Endpoint::ChatCompletions),
            ("POST", "/openai/deployments/ada/embeddings", Endpoint::Embeddings),
            ("POST", "/v1/completions", Endpoint::Completions),
            ("POST", "/v1/responses", Endpoint::Responses),
            ("GET", "/v1/responses/resp_1", Endpoint::Response),
            ("GET", "/v1/responses/resp_1/input_items", Endpoint::Other),
            ("DELETE", "/v1/responses/resp_1", Endpoint::Other),
            ("POST", "/v1/responses/resp_1/cancel", Endpoint::Other),
            ("GET", "/v1/chat/completions", Endpoint::Other),
            ("GET", "/v1/chat/completions/chatcmpl-1/messages", Endpoint::Other),
            ("POST", "/v1/chat/completions/", Endpoint::Other),
            ("GET", "/v1/models", Endpoint::Models),
            ("GET", "/v1/models/", Endpoint::Other),
            ("GET", "/v1/models/meta-llama/Llama-3.1-8B-Instruct", Endpoint::Model),
            ("DELETE", "/v1/models/ft:x", Endpoint::Other),
            ("POST", "/v1/audio/transcriptions", Endpoint::AudioTranscriptions),
            ("POST", "/v1/audio/translations", Endpoint::AudioTranslations),
            ("POST", "/v1/audio/speech", Endpoint::AudioSpeech),
            ("POST", "/v1/images/edits", Endpoint::Images),
            ("POST", "/v1/moderations", Endpoint::Moderations),
            ("GET", "/v1/files/file-1/content", Endpoint::Files),
            ("POST", "/v1/batches", Endpoint::Batches),
            ("GET", "/v1/realtime", Endpoint::Realtime),
            ("POST", "/v1/realtime/sessions", Endpoint::Other),
            ("POST", "/v1/messages", Endpoint::Messages),
            ("POST", "/v1/messages/count_tokens", Endpoint::Other),
            ("POST", "/chat/completions", Endpoint::Other),
            ("POST", "/elsewhere/v1/chat/completions", Endpoint::Other),
            ("GET", "/", Endpoint::Other),
            ("OPTIONS", "/v1/chat/completions", Endpoint::Other),
        ] {
            let method = Method::from_bytes(method.as_bytes()).unwrap();
            assert_eq!(Endpoint::of(&method, path), expected, "{method} {path}");
        }
    }

    #[test]
    fn the_deployment_of_an_azure_path_is_its_model() {
        assert_eq!(azure_deployment("/openai/deployments/gpt-4o/chat/completions"), Some("gpt-4o"));
        assert_eq!(azure_deployment("/openai/v1/chat/completions"), None);
    }

    #[test]
    fn reading_back_what_is_stored_is_not_billed() {
        let bills = |method: Method, path: &str| Endpoint::of(&method, path).may_bill(&method);
        assert!(bills(Method::POST, "/v1/responses") && bills(Method::POST, "/v1/audio/speech"));
        assert!(bills(Method::GET, "/v1/files/file-1/content") && bills(Method::GET, "/v1/realtime"));
        assert!(
            !bills(Method::GET, "/v1/responses/resp_1") && !bills(Method::GET, "/v1/chat/completions/c1")
        );
        assert!(!bills(Method::POST, "/v1/files") && !bills(Method::GET, "/v1/batches/b1"));
    }
}
