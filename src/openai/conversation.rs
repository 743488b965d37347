//! Which calls belong to one conversation, told from how they begin.
//!
//! Every call of a conversation repeats what was said before it, so they all begin alike, and differ from
//! other conversations by their first question at the latest. The identity is a hash of the model, of how the
//! input begins (often a system prompt that many share) and of the words around the first `"user"`, together
//! with `user` and `prompt_cache_key` where a client gives them. Only bounded pieces are hashed: a call must
//! not pay for the length of its prompt.
//!
//! It is a hint, for keeping calls where their prompt is cached. Two conversations that begin alike share what
//! is cached, and one that is not recognised is routed like any other call.

use memchr::{memchr, memrchr};

use super::Call;

/// Calls with less input than this have no identity: what a cache could save them is nothing.
pub const LEAST_INPUT_BYTES: usize = 1024;
/// Hashed of the beginning of the input.
const HEAD_BYTES: usize = 128;
/// Hashed before and after the first `"user"`.
const WINDOW_BYTES: usize = 256;
/// Hashed of a prompt that is one string: it may grow from call to call, so its beginning alone is sure.
const STRING_BYTES: usize = 64;

impl Call {
    /// The conversation that the call, read from `body`, belongs to; none when it is short or cannot be told.
    pub fn conversation(&self, body: &[u8]) -> Option<u64> {
        if self.input_bytes < LEAST_INPUT_BYTES {
            return None;
        }
        let mut hash = Hash::default();
        let mut has_opening = false;
        hash.add(self.model.as_bytes());
        for member in &self.members {
            let value = member.value(body);
            match &body[member.key.start + 1..member.key.end - 1] {
                b"messages" | b"input" | b"prompt" => {
                    let user = self.first_user.and_then(|at| at.checked_sub(member.value.start));
                    has_opening |= hash.add_opening(value, user);
                }
                b"user" | b"prompt_cache_key" => hash.add(&value[..value.len().min(WINDOW_BYTES)]),
                _ => {}
            }
        }
        has_opening.then_some(hash.finish())
    }
}

/// The hash of `FxHash`, a multiplication for eight bytes, mixed at the end.
#[derive(Debug, Default)]
struct Hash(u64);

impl Hash {
    fn add(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            self.word(u64::from_le_bytes(*word));
        }
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        self.word(u64::from_le_bytes(last));
        self.word(bytes.len() as u64);
    }

    fn word(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
    }

    /// Adds how a conversation begins, the role of whose first question is at `user`; false without one.
    fn add_opening(&mut self, value: &[u8], user: Option<usize>) -> bool {
        if value.first() == Some(&b'"') {
            self.add(&value[..value.len().min(STRING_BYTES)]);
            return true;
        }
        let Some(user) = user.filter(|at| *at < value.len()) else { return false };
        // Cut at the borders of the objects: what follows the first question differs from call to call.
        let head = &value[..value.len().min(HEAD_BYTES)];
        self.add(&head[..memchr(b'}', head).unwrap_or(head.len())]);
        let before = &value[user.saturating_sub(WINDOW_BYTES)..user];
        self.add(&before[memrchr(b'{', before).unwrap_or(0)..]);
        let after = &value[user..value.len().min(user + WINDOW_BYTES)];
        self.add(&after[..memchr(b'}', after).unwrap_or(after.len())]);
        true
    }

    fn finish(self) -> u64 {
        let mixed = (self.0 ^ (self.0 >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        mixed ^ (mixed >> 33)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use serde_json::{Value, json};

    use super::super::Endpoint;
    use super::*;

    fn of(endpoint: Endpoint, body: &Value) -> Option<u64> {
        let bytes = Bytes::from(body.to_string());
        Call::read(endpoint, &bytes).unwrap().conversation(&bytes)
    }

    fn chat(messages: &[Value]) -> Option<u64> {
        of(Endpoint::ChatCompletions, &json!({"model": "m", "messages": messages}))
    }

    fn said(role: &str, text: &str) -> Value {
        json!({"role": role, "content": text})
    }

    fn long(text: &str) -> String {
        format!("{text} {}", "and so on ".repeat(200))
    }

    #[test]
    fn every_call_of_a_conversation_has_the_same_identity() {
        for system in ["Be brief.".to_owned(), long("You are a helpful assistant. {\"a\": 1}")] {
            for question in ["hi".to_owned(), long("Explain {this} to me")] {
                let mut messages = vec![said("system", &system), said("user", &question)];
                messages.push(said("assistant", &long("Certainly.")));
                messages.push(said("user", "go on"));
                let second = chat(&messages);
                messages.extend([said("assistant", "Well"), said("user", "and then?")]);
                assert!(second.is_some());
                assert_eq!(chat(&messages), second, "{system:.9} {question:.9}");
            }
        }
    }

    #[test]
    fn another_first_question_or_model_is_another_conversation() {
        let system = said("system", &long("You are a helpful assistant."));
        let first = chat(&[system.clone(), said("user", "one")]);
        assert_ne!(first, chat(&[system.clone(), said("user", "two")]));
        let parts = |text: &str| json!({"content": [{"type": "text", "text": text}], "role": "user"});
        let ordered = chat(&[system.clone(), parts("one")]);
        assert_ne!(ordered, chat(&[system.clone(), parts("two")]));
        let body = |model: &str, user: &str| {
            let messages = json!([system, said("user", "one")]);
            of(Endpoint::ChatCompletions, &json!({"model": model, "user": user, "messages": messages}))
        };
        assert_ne!(body("m", "a"), body("n", "a"));
        assert_ne!(body("m", "a"), body("m", "b"));
    }

    #[test]
    fn prompts_that_grow_keep_their_identity() {
        let prompt = |text: &str| of(Endpoint::Completions, &json!({"model": "m", "prompt": text}));
        assert_eq!(prompt(&long("Once")), prompt(&long(&long("Once"))));
        assert_ne!(prompt(&long("Once")), prompt(&long("Twice")));
        let input = |turns: usize| {
            let mut items = vec![said("user", &long("Once")); 1];
            items.extend((0..turns).map(|_| said("assistant", "upon a time")));
            of(Endpoint::Responses, &json!({"model": "m", "input": items}))
        };
        assert!(input(0).is_some());
        assert_eq!(input(0), input(3));
    }

    #[test]
    fn what_is_short_or_has_no_question_has_none() {
        assert_eq!(chat(&[said("user", "hi")]), None);
        assert_eq!(chat(&[said("system", &long("You are"))]), None);
        assert_eq!(of(Endpoint::Embeddings, &json!({"model": "m"})), None);
    }
}
