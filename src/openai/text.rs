//! The text of a complete answer, to be counted where a server reports no usage.

use serde_json::Value;

use super::Endpoint;

/// Text, reasoning and tool arguments of every choice, one after the other. Empty when there are none.
pub fn produced(endpoint: Endpoint, answer: &[u8]) -> String {
    let Ok(answer) = serde_json::from_slice::<Value>(answer) else { return String::new() };
    let mut text = String::new();
    match endpoint {
        Endpoint::ChatCompletions => {
            for choice in items(&answer["choices"]) {
                let message = &choice["message"];
                for part in ["content", "reasoning", "reasoning_content", "refusal"] {
                    push(&mut text, &message[part]);
                }
                for call in items(&message["tool_calls"]) {
                    push(&mut text, &call["function"]["name"]);
                    push(&mut text, &call["function"]["arguments"]);
                }
            }
        }
        Endpoint::Completions => {
            items(&answer["choices"]).for_each(|choice| push(&mut text, &choice["text"]));
        }
        Endpoint::Responses => {
            for item in items(&answer["output"]) {
                push(&mut text, &item["arguments"]);
                items(&item["content"]).for_each(|part| push(&mut text, &part["text"]));
                items(&item["summary"]).for_each(|part| push(&mut text, &part["text"]));
            }
        }
        _ => {}
    }
    text
}

fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn push(text: &mut String, value: &Value) {
    text.push_str(value.as_str().unwrap_or_default());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_reasoning_and_tool_arguments_are_taken_from_every_choice() {
        for (endpoint, answer, text) in [
            (
                Endpoint::ChatCompletions,
                r#"{"choices":[{"message":{"content":"a","reasoning":"b"}},{"message":{"content":null,
                    "tool_calls":[{"function":{"name":"f","arguments":"{}"}}]}}]}"#,
                "abf{}",
            ),
            (Endpoint::Completions, r#"{"choices":[{"text":"x"},{"text":"y"}]}"#, "xy"),
            (Endpoint::Responses, r#"{"output":[{"content":[{"text":"z"}]},{"arguments":"{}"}]}"#, "z{}"),
            (Endpoint::Embeddings, r#"{"data":[{"embedding":"AAA"}]}"#, ""),
            (Endpoint::ChatCompletions, "not json", ""),
        ] {
            assert_eq!(produced(endpoint, answer.as_bytes()), text);
        }
    }
}
