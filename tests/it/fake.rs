//! The fake server is what it says: shapes, counts, latency, faults.

use std::time::Duration;

use breakeven::demo::{FakeBackend, Fault, Personality, Settings, State};
use bytes::Bytes;
use http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::{End, Events, Http, chat, data, read, spoken, with};

const ALL: [Personality; 3] = [Personality::OpenAi, Personality::Vllm, Personality::LlamaCpp];

async fn start(personality: Personality) -> (FakeBackend, Http) {
    start_with(personality, Settings { models: vec!["gpt-4o-mini".into()], ..Settings::default() }).await
}

async fn start_with(personality: Personality, settings: Settings) -> (FakeBackend, Http) {
    let fake = FakeBackend::start(personality, settings).await.unwrap();
    let http = Http::new(&fake.url());
    (fake, http)
}

fn streamed(members: Value) -> Value {
    with(with(chat("gpt-4o-mini"), json!({"stream": true})), members)
}

#[tokio::test]
async fn a_chat_reports_what_was_produced() {
    for personality in ALL {
        let (fake, http) = start(personality).await;
        let reply =
            http.post("/chat/completions", &with(chat("gpt-4o-mini"), json!({"max_tokens": 5}))).await;
        let body = reply.json();
        assert_eq!(body["choices"][0]["finish_reason"], "length", "{personality:?}");
        let usage = fake.produced()[0].usage;
        assert_eq!(body["usage"]["prompt_tokens"], usage.input_tokens);
        assert_eq!(body["usage"]["completion_tokens"], 5);
        assert_eq!((usage.input_tokens, usage.output_tokens), (13, 5));
        assert_eq!(fake.produced()[0].state, State::Finished);
    }
}

#[tokio::test]
async fn a_stream_says_the_same_as_a_whole_answer() {
    for personality in ALL {
        let (_fake, http) = start(personality).await;
        let whole = http.post("/chat/completions", &chat("gpt-4o-mini")).await.json();
        let stream = http.open("/chat/completions", &streamed(json!({}))).await;
        let (events, end) = Events::of(stream).rest().await;
        assert_eq!(spoken(&events), whole["choices"][0]["message"]["content"].as_str().unwrap());
        assert_eq!((events.last().unwrap().as_str(), end), ("data: [DONE]", End::Complete));
        assert!(data(&events).iter().all(|chunk| chunk["usage"].is_null()), "{personality:?}");
    }
}

#[tokio::test]
async fn usage_comes_in_an_extra_chunk_when_it_is_asked_for() {
    for personality in ALL {
        let (fake, http) = start(personality).await;
        let body = streamed(json!({"stream_options": {"include_usage": true}}));
        let (events, _) = Events::of(http.open("/chat/completions", &body).await).rest().await;
        let chunks = data(&events);
        let last = chunks.last().unwrap();
        assert_eq!(last["choices"], json!([]), "{personality:?}");
        assert_eq!(last["usage"]["completion_tokens"], fake.produced()[0].usage.output_tokens);
        assert_eq!(chunks.iter().filter(|chunk| chunk["usage"].is_object()).count(), 1);
    }
}

#[tokio::test]
async fn llama_cpp_reports_the_usage_of_each_choice_in_mid_stream() {
    let (_fake, http) = start(Personality::LlamaCpp).await;
    let body = streamed(json!({"n": 2, "stream_options": {"include_usage": true}}));
    let (events, _) = Events::of(http.open("/chat/completions", &body).await).rest().await;
    let usages: Vec<u64> =
        data(&events).iter().filter_map(|chunk| chunk["usage"]["completion_tokens"].as_u64()).collect();
    assert_eq!(usages, [16, 16]);
}

#[tokio::test]
async fn several_choices_are_counted_together() {
    for personality in [Personality::OpenAi, Personality::Vllm] {
        let (_fake, http) = start(personality).await;
        let body = http.post("/chat/completions", &with(chat("gpt-4o-mini"), json!({"n": 3}))).await.json();
        assert_eq!(body["choices"].as_array().unwrap().len(), 3);
        assert_eq!(body["usage"]["completion_tokens"], 48);
    }
}

#[tokio::test]
async fn structured_output_and_tool_calls_satisfy_their_schemas() {
    let (_fake, http) = start(Personality::OpenAi).await;
    let schema = json!({"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city", "days"], "additionalProperties": false});
    let format =
        json!({"type": "json_schema", "json_schema": {"name": "trip", "schema": schema, "strict": true}});
    let reply =
        http.post("/chat/completions", &with(chat("gpt-4o-mini"), json!({"response_format": format}))).await;
    let content = reply.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    let parsed: Value = serde_json::from_str(&content).unwrap();
    assert!(parsed["city"].is_string() && parsed["days"].is_i64(), "{content}");

    let tool = json!({"type": "function", "function": {"name": "weather", "parameters": schema}});
    let body = with(chat("gpt-4o-mini"), json!({"tools": [tool]}));
    let whole = http.post("/chat/completions", &body).await.json();
    let call = &whole["choices"][0]["message"]["tool_calls"][0]["function"];
    assert_eq!(
        (&whole["choices"][0]["finish_reason"], &call["name"]),
        (&json!("tool_calls"), &json!("weather"))
    );
    let stream = http.open("/chat/completions", &with(body, json!({"stream": true}))).await;
    let (events, _) = Events::of(stream).rest().await;
    let arguments: String = data(&events)
        .iter()
        .filter_map(|chunk| {
            chunk.pointer("/choices/0/delta/tool_calls/0/function/arguments")?.as_str().map(str::to_owned)
        })
        .collect();
    assert_eq!(arguments, call["arguments"].as_str().unwrap());
}

#[tokio::test]
async fn a_response_stream_ends_with_the_object_and_its_usage() {
    for personality in ALL {
        let (fake, http) = start(personality).await;
        let body = json!({"model": "gpt-4o-mini", "input": "Hello there", "stream": true});
        let (events, _) = Events::of(http.open("/responses", &body).await).rest().await;
        let last = data(&events).pop().unwrap();
        assert_eq!(last["type"], "response.completed");
        assert_eq!(last["response"]["usage"]["output_tokens"], 16);
        assert_eq!(last["response"]["usage"]["input_tokens"], fake.produced()[0].usage.input_tokens);
        assert!(events[0].starts_with("event: response.created\n"), "{personality:?}");
    }
}

#[tokio::test]
async fn embeddings_are_the_same_numbers_in_both_encodings() {
    let (_fake, http) = start_with(Personality::OpenAi, Settings::default()).await;
    let body = json!({"model": "text-embedding-3-small", "input": ["one", "two"], "dimensions": 4});
    let floats = http.post("/embeddings", &body).await.json();
    assert_eq!(floats["data"][1]["embedding"].as_array().unwrap().len(), 4);
    assert_eq!(floats["usage"]["prompt_tokens"], 2);
    let encoded = http.post("/embeddings", &with(body, json!({"encoding_format": "base64"}))).await.json();
    let first = floats["data"][0]["embedding"][0].as_f64().unwrap();
    assert_eq!(encoded["data"][0]["embedding"].as_str().unwrap().len(), 24);
    assert!(first.abs() <= 0.0625 && first != 0.0);
}

#[tokio::test]
async fn self_hosted_servers_without_embeddings_say_so_each_in_its_way() {
    for (personality, status) in [(Personality::Vllm, 404), (Personality::LlamaCpp, 501)] {
        let (_fake, http) = start(personality).await;
        let reply = http.post("/embeddings", &json!({"model": "m", "input": "x"})).await;
        assert_eq!(reply.status.as_u16(), status);
    }
}

#[tokio::test]
async fn errors_have_the_shape_of_their_server() {
    let cases = [
        (Personality::OpenAi, json!("invalid_api_key"), json!("context_length_exceeded")),
        (Personality::Vllm, Value::Null, json!(400)),
        (Personality::LlamaCpp, json!(401), json!(400)),
    ];
    for (personality, key_code, long_code) in cases {
        let settings = Settings {
            api_key: Some("sk-right".into()),
            context_window: 4,
            models: vec!["gpt-4o-mini".into()],
            ..Settings::default()
        };
        let (_fake, http) = start_with(personality, settings).await;
        let body = Bytes::from(chat("gpt-4o-mini").to_string());
        let with_key = |key: &str| {
            let request = http.request(Method::POST, "/chat/completions");
            request
                .header("authorization", format!("Bearer {key}"))
                .header("content-type", "application/json")
        };
        let refused = http.send(with_key("sk-wrong-key"), body.clone()).await;
        assert_eq!(refused.status, StatusCode::UNAUTHORIZED);
        assert_eq!(refused.json().pointer("/error/code").unwrap_or(&Value::Null), &key_code);
        let long = http.send(with_key("sk-right"), body).await;
        assert_eq!(long.status, StatusCode::BAD_REQUEST);
        assert_eq!(long.json()["error"]["code"], long_code);
        let unknown = http.send(with_key("sk-right"), Bytes::from(chat("nope").to_string())).await;
        let expected = if personality == Personality::LlamaCpp { 400 } else { 404 };
        assert_eq!(unknown.status.as_u16(), expected, "{personality:?}");
    }
}

#[tokio::test]
async fn ordered_failures_hit_the_next_calls_and_spare_probes() {
    let (fake, http) = start(Personality::OpenAi).await;
    fake.fail_next(1, &Fault::RateLimited { retry_after: Duration::from_secs(3) });
    fake.fail_next(1, &Fault::Status(500));
    assert_eq!(http.get("/models").await.status, StatusCode::OK);
    let limited = http.post("/chat/completions", &chat("gpt-4o-mini")).await;
    assert_eq!((limited.status.as_u16(), limited.header("retry-after")), (429, "3"));
    assert_eq!(limited.header("x-ratelimit-remaining-requests"), "0");
    let failed = http.post("/chat/completions", &chat("gpt-4o-mini")).await;
    assert_eq!((failed.status.as_u16(), &failed.json()["error"]["type"]), (500, &json!("server_error")));
    assert_eq!(http.post("/chat/completions", &chat("gpt-4o-mini")).await.status, StatusCode::OK);
    assert_eq!(fake.totals().refused, 2);
}

#[tokio::test]
async fn a_stream_can_be_cut_in_every_way() {
    let cases = [
        (Fault::ResetAfter(3), 3, End::Broken),
        (Fault::CloseAfter(3), 3, End::Broken),
        (Fault::TruncateAfter(3), 3, End::Complete),
        (Fault::ErrorEventAfter(3), 5, End::Complete),
    ];
    for (fault, count, expected) in cases {
        let (fake, http) = start(Personality::Vllm).await;
        fake.fail_next(1, &fault);
        let (events, end) =
            Events::of(http.open("/chat/completions", &streamed(json!({}))).await).rest().await;
        assert_eq!((events.len(), end), (count, expected), "{fault:?}");
        assert_eq!(fake.produced()[0].state, State::Broken);
        assert_eq!(fake.produced()[0].usage.output_tokens, 2);
    }
}

#[tokio::test]
async fn a_connection_can_be_reset_before_headers() {
    let (fake, http) = start(Personality::Vllm).await;
    fake.fail_next(1, &Fault::ResetBeforeHeaders);
    let request = http.request(Method::POST, "/chat/completions").header("content-type", "application/json");
    assert!(http.start(request, Bytes::from(chat("gpt-4o-mini").to_string())).await.is_err());
}

#[tokio::test]
async fn bytes_one_by_one_comments_and_carriage_returns_say_the_same() {
    for faults in [vec![Fault::SingleBytes], vec![Fault::Comments], vec![Fault::CarriageReturns]] {
        let (fake, http) = start(Personality::OpenAi).await;
        fake.set(|settings| settings.faults = faults.clone());
        let reply = read(http.open("/chat/completions", &streamed(json!({}))).await).await;
        let text = reply.text().replace("\r\n", "\n").replace(":\n\n: keep-alive\n\n", "");
        fake.set(|settings| settings.faults.clear());
        let plain = read(http.open("/chat/completions", &streamed(json!({}))).await).await;
        let events = |text: &str| spoken(&text.split("\n\n").map(str::to_owned).collect::<Vec<_>>());
        assert_eq!(events(&text), events(plain.text()), "{faults:?}");
    }
}

#[tokio::test]
async fn gzip_answers_decode_to_the_answer() {
    use std::io::Read;
    let (fake, http) = start(Personality::OpenAi).await;
    for body in [chat("gpt-4o-mini"), streamed(json!({}))] {
        fake.fail_next(1, &Fault::Gzip);
        let reply = http.post("/chat/completions", &body).await;
        assert_eq!(reply.header("content-encoding"), "gzip");
        let mut text = String::new();
        flate2::read::GzDecoder::new(&reply.body[..]).read_to_string(&mut text).unwrap();
        assert!(text.contains("chat.completion"), "{text}");
    }
}

#[tokio::test]
async fn usage_can_be_missing_in_mid_stream_or_beside_choices() {
    let asked = streamed(json!({"stream_options": {"include_usage": true}}));
    for (fault, expected) in [(Fault::NoUsage, 0), (Fault::UsageInMidStream, 1), (Fault::UsageWithChoices, 1)]
    {
        let (fake, http) = start(Personality::Vllm).await;
        fake.fail_next(1, &fault);
        let (events, _) = Events::of(http.open("/chat/completions", &asked).await).rest().await;
        let chunks = data(&events);
        let with_usage: Vec<usize> = chunks
            .iter()
            .enumerate()
            .filter(|(_, chunk)| chunk["usage"].is_object())
            .map(|(index, _)| index)
            .collect();
        assert_eq!(with_usage.len(), expected, "{fault:?}");
        let is_last = with_usage.first().is_none_or(|index| index + 1 == chunks.len());
        assert_eq!(is_last, fault != Fault::UsageInMidStream);
    }
}

#[tokio::test]
async fn a_client_that_hangs_up_is_noticed_and_only_what_was_produced_is_counted() {
    for personality in ALL {
        let settings = Settings {
            output_tokens: 10_000,
            time_per_output_token: Duration::from_millis(1),
            ..Settings::default()
        };
        let (fake, http) = start_with(personality, settings).await;
        let mut events = Events::of(http.open("/chat/completions", &streamed(json!({}))).await);
        for _ in 0..4 {
            events.next().await.unwrap();
        }
        let hung_up = fake.elapsed();
        drop(events);
        assert!(fake.until(|fake| fake.totals().aborted == 1).await);
        let produced = fake.produced().remove(0);
        let State::Aborted { noticed_at } = produced.state else { panic!("{:?}", produced.state) };
        assert!(noticed_at.saturating_sub(hung_up) < Duration::from_millis(100), "{personality:?}");
        assert!((3..1_000).contains(&produced.usage.output_tokens), "{:?}", produced.usage);
        assert!(fake.until(|fake| fake.in_flight() == 0).await);
    }
}

#[tokio::test]
async fn llama_cpp_runs_a_call_that_is_no_stream_to_its_end() {
    let settings = Settings {
        output_tokens: 40,
        time_per_output_token: Duration::from_millis(1),
        ..Settings::default()
    };
    let (fake, http) = start_with(Personality::LlamaCpp, settings).await;
    let body = chat("any");
    let call = http.open("/chat/completions", &body);
    tokio::select! {
        _ = call => panic!("40 tokens take 40 ms"),
        running = fake.until(|fake| fake.in_flight() == 1) => assert!(running),
    }
    assert!(fake.until(|fake| fake.totals().requests == 1).await);
    assert_eq!(fake.totals().usage.output_tokens, 40);
}

#[tokio::test]
async fn calls_beyond_the_slots_wait_in_line() {
    let settings = Settings { slots: 2, output_tokens: 100_000, ..Settings::default() };
    let (fake, http) = start_with(Personality::Vllm, settings).await;
    fake.set(|settings| settings.faults = vec![Fault::StallAfter(1)]);
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(http.open("/chat/completions", &streamed(json!({}))).await);
    }
    assert!(fake.until(|fake| fake.in_flight() == 2 && fake.waiting() == 1).await);
    let root = Http::new(&fake.url().replace("/v1", ""));
    let metrics = root.get("/metrics").await;
    assert!(metrics.text().contains("vllm:num_requests_running{engine=\"0\",model_name=\"\"} 2.0"));
    assert!(metrics.text().contains("vllm:num_requests_waiting{engine=\"0\",model_name=\"\"} 1.0"));
    drop(held);
    assert!(fake.until(|fake| fake.in_flight() == 0 && fake.waiting() == 0).await);
    assert_eq!(fake.most_in_flight(), 2);
}

#[tokio::test]
async fn uploads_batches_and_binary_answers_work() {
    let (_fake, http) = start_with(Personality::OpenAi, Settings::default()).await;
    let line = json!({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": chat("gpt-4o-mini")});
    let form = format!(
        "--cut\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n\
         --cut\r\nContent-Disposition: form-data; name=\"file\"; filename=\"in.jsonl\"\r\n\r\n{line}\n\r\n--cut--\r\n"
    );
    let upload =
        http.request(Method::POST, "/files").header("content-type", "multipart/form-data; boundary=cut");
    let file = http.send(upload, Bytes::from(form)).await.json();
    assert_eq!(file["purpose"], "batch");
    let batch = http
        .post("/batches", &json!({"input_file_id": file["id"], "endpoint": "/v1/chat/completions"}))
        .await;
    let output = batch.json()["output_file_id"].as_str().unwrap().to_owned();
    let content = http.get(&format!("/files/{output}/content")).await.json();
    assert_eq!(content["response"]["body"]["usage"]["completion_tokens"], 16);

    let speech =
        http.post("/audio/speech", &json!({"model": "tts-1", "input": "one two", "voice": "alloy"})).await;
    assert_eq!((speech.header("content-type"), speech.body.len()), ("audio/mpeg", 2 * 4 * 400));
}

#[tokio::test]
async fn it_speaks_http2_without_tls() {
    let (fake, _) = start(Personality::OpenAi).await;
    let reply = Http::h2c(&fake.url()).post("/chat/completions", &chat("gpt-4o-mini")).await;
    assert_eq!(reply.status, StatusCode::OK);
    assert_eq!(fake.calls()[0].version, http::Version::HTTP_2);
}

#[tokio::test]
async fn a_stopped_server_breaks_its_streams_and_refuses_connections() {
    let settings = Settings { faults: vec![Fault::StallAfter(2)], ..Settings::default() };
    let (fake, http) = start_with(Personality::Vllm, settings).await;
    let mut events = Events::of(http.open("/chat/completions", &streamed(json!({}))).await);
    events.next().await.unwrap();
    events.next().await.unwrap();
    fake.stop().await;
    assert_eq!(events.next().await, Err(End::Broken));
    let request = http.request(Method::GET, "/models");
    assert!(http.start(request, Bytes::new()).await.is_err());
}

#[tokio::test]
async fn chance_with_the_same_seed_is_the_same() {
    let outcomes = async || {
        let chaos = breakeven::demo::Chaos {
            seed: 7,
            probability: 0.5,
            faults: vec![Fault::Status(500), Fault::Status(503)],
        };
        let (_fake, http) =
            start_with(Personality::OpenAi, Settings { chaos: Some(chaos), ..Settings::default() }).await;
        let mut statuses = Vec::new();
        for _ in 0..20 {
            statuses.push(http.post("/chat/completions", &chat("m")).await.status.as_u16());
        }
        statuses
    };
    let first = outcomes().await;
    assert_eq!(first, outcomes().await);
    assert!(first.contains(&200) && first.contains(&500) && first.contains(&503), "{first:?}");
}
