//! The list of models: the API's, and those of our routes that it does not know.

use std::collections::HashSet;

use bytes::Bytes;
use serde_json::{Value, json};

use crate::config::Config;

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
