//! What a deployment's `model` and `api_base` mean: who serves it, where, and under which name.

use std::net::IpAddr;

use super::super::toml_text::plain;
use super::Kind;
use crate::economics::TokenPrice;
use crate::prices::write::decimal;

/// Server software that LiteLLM has a provider for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Server {
    Vllm,
    Ollama,
    LlamaCpp,
    Other,
}

impl Server {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Vllm => "vllm",
            Self::Ollama => "ollama",
            Self::LlamaCpp => "llama_cpp",
            Self::Other => "other",
        }
    }
}

/// Where a deployment's calls go.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) kind: Kind,
    /// What to call the backend.
    pub(super) name: String,
    /// The model's name there.
    pub(super) model: String,
    /// None when it is in a variable.
    pub(super) base_url: Option<String>,
    pub(super) address_variable: Option<String>,
    /// Where LiteLLM looks for the key if none is written.
    pub(super) key_variable: String,
}

/// APIs that speak OpenAI's protocol, by LiteLLM's prefix: base URL, and variable of the key.
const APIS: [(&str, &str, &str); 12] = [
    ("openai", "https://api.openai.com/v1", "OPENAI_API_KEY"),
    ("anthropic", "https://api.anthropic.com/v1", "ANTHROPIC_API_KEY"),
    ("cerebras", "https://api.cerebras.ai/v1", "CEREBRAS_API_KEY"),
    ("deepinfra", "https://api.deepinfra.com/v1/openai", "DEEPINFRA_API_KEY"),
    ("deepseek", "https://api.deepseek.com/v1", "DEEPSEEK_API_KEY"),
    ("fireworks_ai", "https://api.fireworks.ai/inference/v1", "FIREWORKS_AI_API_KEY"),
    ("gemini", "https://generativelanguage.googleapis.com/v1beta/openai", "GEMINI_API_KEY"),
    ("groq", "https://api.groq.com/openai/v1", "GROQ_API_KEY"),
    ("mistral", "https://api.mistral.ai/v1", "MISTRAL_API_KEY"),
    ("openrouter", "https://openrouter.ai/api/v1", "OPENROUTER_API_KEY"),
    ("together_ai", "https://api.together.xyz/v1", "TOGETHERAI_API_KEY"),
    ("xai", "https://api.x.ai/v1", "XAI_API_KEY"),
];

/// Self-hosted servers, by LiteLLM's prefix, and where each listens if nothing is said.
const SERVERS: [(&str, Server, &str); 7] = [
    ("hosted_vllm", Server::Vllm, "http://127.0.0.1:8000/v1"),
    ("vllm", Server::Vllm, "http://127.0.0.1:8000/v1"),
    ("ollama", Server::Ollama, "http://127.0.0.1:11434/v1"),
    ("ollama_chat", Server::Ollama, "http://127.0.0.1:11434/v1"),
    ("llamafile", Server::LlamaCpp, "http://127.0.0.1:8080/v1"),
    ("lm_studio", Server::Other, "http://127.0.0.1:1234/v1"),
    ("xinference", Server::Other, "http://127.0.0.1:9997/v1"),
];

/// Azure's OpenAI service: its paths below [`AZURE_PATH`] are OpenAI's, and its key may be a bearer token there.
const AZURE: &str = "azure";
const AZURE_PATH: &str = "/openai/v1";

/// Prefixes of services with protocols of their own.
const FOREIGN: [&str; 9] = [
    "azure_ai",
    "bedrock",
    "vertex_ai",
    "vertex_ai_beta",
    "sagemaker",
    "cohere",
    "replicate",
    "huggingface",
    "watsonx",
];

/// Who serves `model`, by its prefix and its address; or why nobody does.
pub(super) fn target(model: &str, custom: Option<&str>, base: Option<&str>) -> Result<Target, String> {
    let (provider, name) = split(model, custom);
    if provider == AZURE {
        return azure(name, base);
    }
    if FOREIGN.contains(&provider) {
        return Err(format!("`{provider}` does not speak OpenAI's protocol"));
    }
    let variable = base.and_then(|base| base.strip_prefix("os.environ/")).map(str::to_owned);
    let written = base.filter(|_| variable.is_none()).map(|base| base.trim_end_matches('/').to_owned());
    if let Some((_, server, default)) = SERVERS.iter().find(|(prefix, ..)| *prefix == provider) {
        let default = variable.is_none().then(|| (*default).to_owned());
        return Ok(own(*server, server.word(), name, written.map(|url| with_v1(&url)).or(default), variable));
    }
    let Some((_, default, key_variable)) = APIS.iter().find(|(prefix, ..)| *prefix == provider) else {
        return Err(format!("`{}` is a provider that this converter does not know", plain(provider)));
    };
    if let Some(url) = written.as_deref().filter(|url| is_own_host(url)) {
        return Ok(own(Server::Vllm, "gpu", name, Some(with_v1(url)), None));
    }
    let (backend, key_variable) = match written.as_deref().filter(|url| url != default) {
        Some(url) => (host(url).to_owned(), format!("{}_API_KEY", shout(host(url)))),
        None => (provider.to_owned(), (*key_variable).to_owned()),
    };
    let base_url = variable.is_none().then(|| written.unwrap_or_else(|| (*default).to_owned()));
    Ok(Target {
        kind: Kind::Api,
        name: backend,
        model: name.to_owned(),
        base_url,
        address_variable: variable,
        key_variable,
    })
}

/// A deployment at Azure: its resource is the backend, its own name the model's.
fn azure(deployment: &str, base: Option<&str>) -> Result<Target, String> {
    let Some(base) = base else {
        return Err("it has no `api_base`, which is that of your Azure resource".to_owned());
    };
    let variable = base.strip_prefix("os.environ/").map(str::to_owned);
    let origin = |url: &str| {
        url.split_once("/openai").map_or(url, |(origin, _)| origin).trim_end_matches('/').to_owned()
    };
    Ok(Target {
        kind: Kind::Api,
        name: AZURE.to_owned(),
        model: deployment.to_owned(),
        base_url: variable.is_none().then(|| format!("{}{AZURE_PATH}", origin(base))),
        address_variable: variable,
        key_variable: "AZURE_API_KEY".to_owned(),
    })
}

fn own(
    server: Server,
    name: &str,
    model: &str,
    base_url: Option<String>,
    address_variable: Option<String>,
) -> Target {
    Target {
        kind: Kind::SelfHosted(server),
        name: name.to_owned(),
        model: model.to_owned(),
        base_url,
        address_variable,
        key_variable: format!("{}_API_KEY", shout(name)),
    }
}

/// `groq/llama-3.1-8b` to provider and name; a name without a slash is OpenAI's.
fn split<'a>(model: &'a str, custom: Option<&'a str>) -> (&'a str, &'a str) {
    if let Some(custom) = custom {
        let name = model.strip_prefix(custom).and_then(|rest| rest.strip_prefix('/'));
        return (custom, name.unwrap_or(model));
    }
    match model.split_once('/') {
        None => ("openai", model),
        // LiteLLM's way to ask for the Responses API; here the client's path decides.
        Some(("openai", name)) => ("openai", name.strip_prefix("responses/").unwrap_or(name)),
        Some(found) => found,
    }
}

/// A self-hosted server's OpenAI-compatible paths are below `/v1`.
fn with_v1(url: &str) -> String {
    let has_path = url.split_once("://").is_some_and(|(_, rest)| rest.contains('/'));
    if has_path { url.to_owned() } else { format!("{url}/v1") }
}

/// Whether an address is one that only an own network has.
fn is_own_host(url: &str) -> bool {
    let host = host(url);
    match host.trim_matches(['[', ']']).parse::<IpAddr>() {
        Ok(IpAddr::V4(ip)) => {
            ip.is_loopback() || ip.is_private() || ip.is_link_local() || ip.is_unspecified()
        }
        Ok(IpAddr::V6(ip)) => ip.is_loopback() || ip.is_unique_local() || ip.is_unspecified(),
        Err(_) => {
            let last = host.rsplit('.').next().unwrap_or_default();
            !host.contains('.')
                || host.ends_with(".cluster.local")
                || ["local", "internal", "svc", "lan", "home", "localhost"].contains(&last)
        }
    }
}

/// `api.example.com` of `https://user@api.example.com:8443/v1`.
fn host(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = rest.split(['/', '?']).next().unwrap_or_default();
    let authority = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    match authority.find(']') {
        Some(end) => &authority[..=end],
        None => authority.split(':').next().unwrap_or_default(),
    }
}

/// The name of a variable: capitals, digits, underscores.
fn shout(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' }).collect()
}

/// USD per token to the decimal of USD per million, exact to the last digit that was written.
pub(super) fn usd_per_million(per_token: f64) -> Option<String> {
    let written = format!("{per_token:e}");
    let (digits, exponent) = written.split_once('e')?;
    let exponent = exponent.parse::<i32>().ok()?.saturating_add(6);
    TokenPrice::from_usd_per_million(&format!("{digits}e{exponent}")).ok().map(decimal)
}

/// Why a member of `litellm_params` has no counterpart, where we can say more than that.
pub(super) fn why_lost(name: &str) -> &'static str {
    match name {
        "rpm" | "tpm" => {
            "backends are protected by `capacity` and by the API's own answers, not by fixed rates"
        }
        "api_version" => "Azure's `/openai/v1` needs none",
        "weight" | "order" => "cost decides; `policy = \"split\"` has a fixed share",
        "stream_timeout" => "see `timeouts` of the backend",
        "max_retries" | "num_retries" => "see [retry]",
        "extra_headers" => "see `headers` of the backend; credentials must be references",
        _ => "there is no such setting",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(model: &str, base: Option<&str>) -> String {
        match target(model, None, base) {
            Err(why) => why,
            Ok(found) => {
                let kind = if found.kind == Kind::Api { "api" } else { "own" };
                let url = found.base_url.or(found.address_variable).unwrap_or_default();
                format!("{kind} {} {} {url}", found.name, found.model)
            }
        }
    }

    #[test]
    fn a_deployment_is_known_by_its_prefix_and_its_address() {
        for (model, base, expected) in [
            ("gpt-4o", None, "api openai gpt-4o https://api.openai.com/v1"),
            ("openai/gpt-4o", None, "api openai gpt-4o https://api.openai.com/v1"),
            ("groq/llama-3.1-8b", None, "api groq llama-3.1-8b https://api.groq.com/openai/v1"),
            (
                "openai/m",
                Some("https://llm.example.com/v1"),
                "api llm.example.com m https://llm.example.com/v1",
            ),
            ("openai/org/m", Some("http://10.0.0.7:8000/v1/"), "own gpu org/m http://10.0.0.7:8000/v1"),
            ("openai/m", Some("http://vllm:8000"), "own gpu m http://vllm:8000/v1"),
            (
                "hosted_vllm/org/m",
                Some("https://gpu.example.com/v1"),
                "own vllm org/m https://gpu.example.com/v1",
            ),
            ("ollama/llama3", None, "own ollama llama3 http://127.0.0.1:11434/v1"),
            ("openai/m", Some("os.environ/BASE"), "api openai m BASE"),
            (
                "azure/d",
                Some("https://x.openai.azure.com/"),
                "api azure d https://x.openai.azure.com/openai/v1",
            ),
            ("azure/d", None, "it has no `api_base`, which is that of your Azure resource"),
            ("bedrock/d", None, "`bedrock` does not speak OpenAI's protocol"),
        ] {
            assert_eq!(seen(model, base), expected);
        }
    }

    #[test]
    fn a_host_is_ours_when_only_our_network_has_it() {
        for url in
            ["http://localhost:1/v1", "http://[::1]:8000/v1", "http://172.16.3.4/v1", "http://a.b.svc/v1"]
        {
            assert!(is_own_host(url), "{url}");
        }
        for url in ["https://api.example.com/v1", "http://8.8.8.8/v1", "https://localhost.example.com"] {
            assert!(!is_own_host(url), "{url}");
        }
    }

    #[test]
    fn a_price_per_token_is_moved_by_its_point() {
        for (per_token, per_million) in
            [(1.5e-7, "0.15"), (0.000_002_5, "2.5"), (0.0, "0.0"), (1.375e-6, "1.375")]
        {
            assert_eq!(usd_per_million(per_token).as_deref(), Some(per_million));
        }
        assert_eq!(usd_per_million(-1.0), None);
    }
}
