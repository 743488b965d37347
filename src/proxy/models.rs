//! The list of models: the API's, and those of our routes that it does not know.

use std::collections::HashSet;

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header, request};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use serde_json::{Value, json};

use super::body::Body;
use super::error::ProxyError;
use super::exchange::Exchange;
use super::passthrough;
use crate::config::Config;
use crate::openai::Endpoint;
use crate::upstream::client::Clients;
use crate::upstream::send::MAX_COLLECTED_BYTES;

/// The list of models, or one of them: the API's answer, completed with what only our routes have.
pub async fn answer(
    clients: &Clients,
    exchange: Box<Exchange>,
    parts: request::Parts,
    incoming: Incoming,
) -> Result<Response<Body>, ProxyError> {
    let config = exchange.state().config.clone();
    let endpoint = exchange.endpoint();
    let name = parts.uri.path().strip_prefix("/v1/models/").unwrap_or_default().to_owned();
    let is_ours = endpoint == Endpoint::Model && config.models.contains_key(&name);
    if exchange.state().default_backend().is_none() {
        return match endpoint {
            Endpoint::Models => Ok(json_response(&own(&config))),
            _ if is_ours => Ok(json_response(&model(&name))),
            _ => Err(ProxyError::UnknownModel { model: name.chars().take(128).collect() }),
        };
    }
    let backend = exchange.state().default_backend().cloned().ok_or(ProxyError::NoBackend)?;
    let gateway = exchange.gateway().clone();
    let response = passthrough::pass(&gateway, clients, exchange, &backend, parts, incoming).await?;
    if is_ours && response.status() == StatusCode::NOT_FOUND {
        return Ok(json_response(&model(&name)));
    }
    if endpoint != Endpoint::Models || response.status() != StatusCode::OK {
        return Ok(response);
    }
    let (mut head, body) = response.into_parts();
    let list = Limited::new(body, MAX_COLLECTED_BYTES).collect().await.map_err(|_| ProxyError::BodyBroken)?;
    head.headers.remove(header::CONTENT_LENGTH);
    Ok(Response::from_parts(head, Body::full(completed(list.to_bytes(), &config))))
}

fn json_response(body: &Value) -> Response<Body> {
    let mut response = Response::new(Body::full(body.to_string()));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// A list of our own models, where there is no API to ask.
pub fn own(config: &Config) -> Value {
    json!({ "object": "list", "data": names(config).into_iter().map(model).collect::<Vec<_>>() })
}

/// One of our models.
pub fn model(name: &str) -> Value {
    json!({ "id": name, "object": "model", "created": 0, "owned_by": "breakeven" })
}

/// An API's list with our models that are not on it; the same bytes when none is missing, or when it is not
/// such a list.
pub fn completed(list: Bytes, config: &Config) -> Bytes {
    let Ok(mut parsed) = serde_json::from_slice::<Value>(&list) else { return list };
    let Some(data) = parsed.get_mut("data").and_then(Value::as_array_mut) else { return list };
    let known: HashSet<String> =
        data.iter().filter_map(|model| Some(model["id"].as_str()?.to_owned())).collect();
    let missing: Vec<Value> =
        names(config).into_iter().filter(|name| !known.contains(*name)).map(model).collect();
    if missing.is_empty() {
        return list;
    }
    data.extend(missing);
    Bytes::from(parsed.to_string())
}

fn names(config: &Config) -> Vec<&str> {
    let mut names: Vec<&str> = config.models.keys().map(String::as_str).collect();
    names.sort_unstable();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        let text = r#"
            [backends.openai]
            kind = "api"
            base_url = "https://api.openai.com/v1"
            [routes.all]
            models = ["house-model", "gpt-4o-mini"]
            policy = "api"
            offers = [{ backend = "openai" }]
        "#;
        crate::config::parse(text, "test", &|_| None).unwrap()
    }

    #[test]
    fn a_list_that_has_our_models_keeps_its_bytes() {
        let list = Bytes::from(r#"{"object":"list", "data":[{"id":"gpt-4o-mini"},{"id":"house-model"}]}"#);
        assert_eq!(completed(list.clone(), &config()), list);
        let odd = Bytes::from("[]");
        assert_eq!(completed(odd.clone(), &config()), odd);
    }

    #[test]
    fn a_model_that_only_we_have_is_added() {
        let list = completed(Bytes::from(r#"{"object":"list","data":[{"id":"gpt-4o-mini"}]}"#), &config());
        let list: Value = serde_json::from_slice(&list).unwrap();
        let ids: Vec<_> = list["data"].as_array().unwrap().iter().map(|model| &model["id"]).collect();
        assert_eq!(ids, ["gpt-4o-mini", "house-model"]);
    }
}
