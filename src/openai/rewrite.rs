//! The few changes that a request body may need on its way to a backend.

use std::borrow::Cow;

use bytes::Bytes;

use super::json::{self, Member};
use super::{ApiError, Call};
use crate::config::ParameterRule;

/// What a backend needs to be different. The default changes nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Change<'a> {
    /// The model's name there.
    pub model: Option<&'a str>,
    /// Ask for the usage chunk of a stream, keeping other members of `stream_options`.
    pub include_usage: bool,
    /// For servers that refuse `stream_options`; stronger than `include_usage`.
    pub remove_stream_options: bool,
    /// Members that the backend's dialect treats specially.
    pub rules: &'a [(String, ParameterRule)],
}

/// What becomes of one member.
enum Edit<'a> {
    Keep,
    Remove,
    Value(Cow<'a, [u8]>),
    Key(&'a str),
}

impl Call {
    /// The body with only those top-level members changed; every other byte is kept. When nothing changes it
    /// is the same `Bytes`, not a copy. Must be given the body that this call was read from.
    ///
    /// # Errors
    /// 400 when a rule refuses a parameter that the request has.
    pub fn rewrite(&self, body: &Bytes, change: &Change<'_>) -> Result<Bytes, ApiError> {
        if self.is_fine_as_it_is(change) {
            return Ok(body.clone());
        }
        let edits = self
            .members
            .iter()
            .map(|member| self.edit(member, body, change))
            .collect::<Result<Vec<_>, _>>()?;
        let additions = self.additions(change);
        if additions.is_empty() && edits.iter().all(|edit| matches!(edit, Edit::Keep)) {
            return Ok(body.clone());
        }
        Ok(self.assemble(body, &edits, &additions))
    }

    /// Whether nothing can need a change, known without a look at the members.
    fn is_fine_as_it_is(&self, change: &Change<'_>) -> bool {
        change.rules.is_empty()
            && !change.remove_stream_options
            && !self.asks_for_usage(change)
            && self.model_member.is_some()
            && change.model.is_none_or(|model| model == self.model)
    }

    fn edit<'a>(&self, member: &Member, body: &'a Bytes, change: &Change<'a>) -> Result<Edit<'a>, ApiError> {
        let (name, value) = (member.name(body), member.value(body));
        if let Some((_, rule)) = change.rules.iter().find(|(rule, _)| *rule.as_bytes() == *name) {
            return self.edit_by_rule(rule, &String::from_utf8_lossy(&name), value, body);
        }
        Ok(match &*name {
            b"model" => match change.model {
                Some(model) if json::string(value).as_deref() != Some(model) => Edit::Value(quoted(model)),
                _ => Edit::Keep,
            },
            b"stream_options" if change.remove_stream_options => Edit::Remove,
            b"stream_options" if self.asks_for_usage(change) => {
                with_usage(value).map_or(Edit::Keep, |value| Edit::Value(Cow::Owned(value)))
            }
            _ => Edit::Keep,
        })
    }

    fn edit_by_rule<'a>(
        &self,
        rule: &'a ParameterRule,
        name: &str,
        value: &[u8],
        body: &[u8],
    ) -> Result<Edit<'a>, ApiError> {
        match rule {
            ParameterRule::Drop => Ok(Edit::Remove),
            ParameterRule::Rename(to) if self.has(to, body) => Ok(Edit::Remove),
            ParameterRule::Rename(to) => Ok(Edit::Key(to)),
            // A null is how clients say that they do not use a parameter.
            ParameterRule::Refuse if value == b"null" => Ok(Edit::Remove),
            ParameterRule::Refuse => Err(ApiError::invalid_request(format!(
                "the parameter `{name}` is not supported by the backend that serves this model"
            ))
            .with_param(name)
            .with_code("unsupported_parameter")),
        }
    }

    fn has(&self, name: &str, body: &[u8]) -> bool {
        self.members.iter().any(|member| *member.name(body) == *name.as_bytes())
    }

    fn asks_for_usage(&self, change: &Change<'_>) -> bool {
        change.include_usage
            && !change.remove_stream_options
            && self.stream
            && !self.wants_usage
            && self.endpoint.takes_stream_options()
    }

    fn additions(&self, change: &Change<'_>) -> Vec<u8> {
        let mut members = Vec::new();
        if let (None, Some(model)) = (self.model_member, change.model) {
            members.extend_from_slice(b",\"model\":");
            members.extend_from_slice(&quoted(model));
        }
        if self.stream_options_member.is_none() && self.asks_for_usage(change) {
            members.extend_from_slice(b",\"stream_options\":{\"include_usage\":true}");
        }
        members
    }

    /// Writes the kept members with the separators that stood before them.
    fn assemble(&self, body: &[u8], edits: &[Edit<'_>], additions: &[u8]) -> Bytes {
        let mut out = Vec::with_capacity(body.len() + additions.len() + 128);
        let inside = self.members.first().map_or_else(|| empty_inside(body), |first| first.key.start);
        let end = self.members.last().map_or(inside, |last| last.value.end);
        out.extend_from_slice(&body[..inside]);
        let mut before = None;
        let mut is_first = true;
        for (member, edit) in self.members.iter().zip(edits) {
            let separator = before.map_or(inside..inside, |end| end..member.key.start);
            before = Some(member.value.end);
            if matches!(edit, Edit::Remove) {
                continue;
            }
            if !std::mem::take(&mut is_first) {
                out.extend_from_slice(&body[separator]);
            }
            match edit {
                Edit::Value(value) => {
                    out.extend_from_slice(&body[member.key.start..member.value.start]);
                    out.extend_from_slice(value);
                }
                Edit::Key(key) => {
                    out.extend_from_slice(&quoted(key));
                    out.extend_from_slice(&body[member.key.end..member.value.end]);
                }
                Edit::Keep | Edit::Remove => out.extend_from_slice(&body[member.key.start..member.value.end]),
            }
        }
        out.extend_from_slice(if is_first { additions.get(1..).unwrap_or_default() } else { additions });
        out.extend_from_slice(&body[end..]);
        Bytes::from(out)
    }
}

/// Where the inside of an empty object begins.
fn empty_inside(body: &[u8]) -> usize {
    memchr::memchr(b'{', body).map_or(0, |at| at + 1)
}

fn quoted(text: &str) -> Cow<'static, [u8]> {
    Cow::Owned(serde_json::to_vec(text).expect("a string can always be written as JSON"))
}

/// `stream_options` with `include_usage` true; `None` for what is neither an object nor null.
fn with_usage(options: &[u8]) -> Option<Vec<u8>> {
    if options == b"null" {
        return Some(b"{\"include_usage\":true}".to_vec());
    }
    let mut asked = Vec::new();
    let mut is_empty = true;
    json::members(options, |member| {
        is_empty = false;
        if *member.name(options) == *b"include_usage" {
            asked.push(member.value);
        }
    })
    .ok()?;
    let mut out = Vec::with_capacity(options.len() + 24);
    if asked.is_empty() {
        out.extend_from_slice(if is_empty {
            b"{\"include_usage\":true"
        } else {
            b"{\"include_usage\":true,"
        });
        out.extend_from_slice(&options[1..]);
        return Some(out);
    }
    let mut from = 0;
    for value in asked {
        out.extend_from_slice(&options[from..value.start]);
        out.extend_from_slice(b"true");
        from = value.end;
    }
    out.extend_from_slice(&options[from..]);
    Some(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Map, Value, json};

    use super::*;
    use crate::openai::Endpoint;

    fn rewritten(body: &str, change: &Change<'_>) -> String {
        let body = Bytes::from(body.to_owned());
        let call = Call::read(Endpoint::ChatCompletions, &body).unwrap();
        String::from_utf8(call.rewrite(&body, change).unwrap().to_vec()).unwrap()
    }

    const USAGE: Change<'_> =
        Change { model: None, include_usage: true, remove_stream_options: false, rules: &[] };

    #[test]
    fn an_unchanged_body_is_the_same_bytes() {
        let body = Bytes::from(r#"{"model":"a","stream":true,"stream_options":{"include_usage":true}}"#);
        let call = Call::read(Endpoint::ChatCompletions, &body).unwrap();
        let same = call.rewrite(&body, &Change { model: Some("a"), ..USAGE }).unwrap();
        assert_eq!(same.as_ptr(), body.as_ptr());
    }

    #[test]
    fn only_what_changes_changes() {
        let change = Change { model: Some("b\"c"), ..USAGE };
        for (body, expected) in [
            (r#"{"model":"a"}"#, r#"{"model":"b\"c"}"#),
            (r#"{ "model" : "a" , "x":1 }"#, r#"{ "model" : "b\"c" , "x":1 }"#),
            (r#"{"model":"a","model":"z"}"#, r#"{"model":"b\"c","model":"b\"c"}"#),
            ("{}", r#"{"model":"b\"c"}"#),
            (" {\n} ", " {\"model\":\"b\\\"c\"\n} "),
            (r#"{"x":[1, 2]}"#, r#"{"x":[1, 2],"model":"b\"c"}"#),
        ] {
            assert_eq!(rewritten(body, &change), expected);
        }
    }

    #[test]
    fn usage_is_asked_for_beside_other_options() {
        for (body, expected) in [
            (r#"{"stream":true}"#, r#"{"stream":true,"stream_options":{"include_usage":true}}"#),
            (
                r#"{"stream":true,"stream_options":null}"#,
                r#"{"stream":true,"stream_options":{"include_usage":true}}"#,
            ),
            (
                r#"{"stream":true,"stream_options":{}}"#,
                r#"{"stream":true,"stream_options":{"include_usage":true}}"#,
            ),
            (
                r#"{"stream_options":{"include_obfuscation":false},"stream":true}"#,
                r#"{"stream_options":{"include_usage":true,"include_obfuscation":false},"stream":true}"#,
            ),
            (
                r#"{"stream":true,"stream_options":{"include_usage": false ,"a":1}}"#,
                r#"{"stream":true,"stream_options":{"include_usage": true ,"a":1}}"#,
            ),
            (r#"{"stream":true,"stream_options":7}"#, r#"{"stream":true,"stream_options":7}"#),
            (r#"{"stream":false}"#, r#"{"stream":false}"#),
        ] {
            assert_eq!(rewritten(body, &USAGE), expected);
        }
    }

    #[test]
    fn the_responses_api_is_not_asked_for_what_it_always_gives() {
        let body = Bytes::from(r#"{"stream":true}"#);
        let call = Call::read(Endpoint::Responses, &body).unwrap();
        assert_eq!(call.rewrite(&body, &USAGE).unwrap(), body);
    }

    #[test]
    fn rules_drop_rename_and_refuse() {
        let rules = [
            ("store".to_owned(), ParameterRule::Drop),
            ("max_completion_tokens".to_owned(), ParameterRule::Rename("max_tokens".to_owned())),
            ("logit_bias".to_owned(), ParameterRule::Refuse),
        ];
        let change = Change { rules: &rules, ..Change::default() };
        for (body, expected) in [
            (r#"{"store":true,"a":1}"#, r#"{"a":1}"#),
            (r#"{"a":1, "store":true}"#, r#"{"a":1}"#),
            (r#"{"a":1, "store":true, "b":2}"#, r#"{"a":1, "b":2}"#),
            (r#"{"store":true,"store":false}"#, "{}"),
            (r#"{"max_completion_tokens": 5}"#, r#"{"max_tokens": 5}"#),
            (r#"{"max_completion_tokens":5,"max_tokens":7}"#, r#"{"max_tokens":7}"#),
            (r#"{"logit_bias":null,"a":1}"#, r#"{"a":1}"#),
        ] {
            assert_eq!(rewritten(body, &change), expected);
        }
        let body = Bytes::from(r#"{"logit_bias":{}}"#);
        let error =
            Call::read(Endpoint::ChatCompletions, &body).unwrap().rewrite(&body, &change).unwrap_err();
        assert_eq!((error.param.as_deref(), error.code), (Some("logit_bias"), Some("unsupported_parameter")));
    }

    #[test]
    fn stream_options_go_when_a_server_refuses_them() {
        let change = Change { remove_stream_options: true, ..USAGE };
        let body = r#"{"stream":true,"stream_options":{"include_usage":false}}"#;
        assert_eq!(rewritten(body, &change), r#"{"stream":true}"#);
    }

    proptest! {
        #[test]
        fn a_rewrite_is_what_a_tree_would_become(
            members in proptest::collection::btree_map("model|stream|stream_options|store|user|[a-z\"\\\\é]{1,4}",
                prop_oneof![Just(json!(true)), Just(json!(null)), Just(json!({"include_usage": false, "x": [1]})), "[a-z\"\\\\]{0,4}".prop_map(Value::from)], 0..8),
            pretty in any::<bool>(),
            model in proptest::option::of("[a-z\"]{1,4}"),
            include_usage in any::<bool>(),
            remove_stream_options in any::<bool>(),
        ) {
            let text = if pretty { serde_json::to_string_pretty(&members) } else { serde_json::to_string(&members) }.unwrap();
            let rules = [("store".to_owned(), ParameterRule::Drop), ("user".to_owned(), ParameterRule::Rename("uid".to_owned()))];
            let change = Change { model: model.as_deref(), include_usage, remove_stream_options, rules: &rules };
            let ours: Map<String, Value> = serde_json::from_str(&rewritten(&text, &change)).unwrap();

            let mut tree: Map<String, Value> = members.into_iter().collect();
            if let Some(model) = model { tree.insert("model".into(), model.into()); }
            if remove_stream_options {
                tree.remove("stream_options");
            } else if include_usage && tree.get("stream") == Some(&json!(true)) {
                let options = tree.entry("stream_options").or_insert(json!({}));
                if options.is_null() { *options = json!({}); }
                if let Some(options) = options.as_object_mut() { options.insert("include_usage".into(), true.into()); }
            }
            tree.remove("store");
            if let Some(user) = tree.remove("user") { tree.insert("uid".into(), user); }
            prop_assert_eq!(ours, tree);
        }

        #[test]
        fn every_other_byte_is_kept(prefix in "[ \\n]{0,3}", space in "[ \\t]{0,2}", nested in "[a-z0-9 ]{0,20}") {
            let body = format!("{prefix}{{{space}\"a\"{space}:{space}[\"{nested}\",{{\"model\":1}}]{space},{space}\"model\":{space}\"model-x\"{space},\"z\":0}}{prefix}");
            let change = Change { model: Some("model-y"), ..Change::default() };
            prop_assert_eq!(rewritten(&body, &change), body.replace("\"model-x\"", "\"model-y\""));
        }
    }
}
