//! HTTP's less travelled parts, over raw sockets.

use http::{Method, StatusCode};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::canned::{Canned, answer, raw};
use super::{API_MODEL, between};
use crate::support::{chat, with};

fn post(path: &str, body: &str, more: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n{more}\
         content-length: {}\r\n\r\n{body}",
        body.len()
    )
}

const STREAM: &str = "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"}}]}\n\n\
                      data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":1}}\n\n\
                      data: [DONE]\n\n";

#[tokio::test]
async fn trailers_of_a_stream_reach_a_client_that_takes_them() {
    let upstream = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\ntrailer: x-checksum\r\n\
         \r\n{:x}\r\n{STREAM}\r\n0\r\nx-checksum: abc\r\n\r\n",
        STREAM.len()
    );
    let canned = Canned::new(upstream).await;
    let body = with(chat(API_MODEL), json!({"stream": true, "stream_options": {"include_usage": true}}));
    let reply =
        raw(canned.address(), &post("/v1/chat/completions", &body.to_string(), "te: trailers\r\n")).await;
    assert!(reply.contains("data: [DONE]"), "{reply}");
    assert!(reply.trim_end().ends_with("x-checksum: abc"), "{reply}");
    assert_eq!(canned.proxy.entries().await[0].usage.input_tokens, 3);
}

#[tokio::test]
async fn informational_answers_are_not_taken_for_the_answer() {
    let body = b"{\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":1}}";
    let mut upstream =
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n".to_vec();
    upstream.extend(answer("content-type: application/json", body));
    let canned = Canned::new(upstream).await;
    let reply = canned.http.post("/chat/completions", &chat(API_MODEL)).await;
    assert_eq!((reply.status, &reply.body[..]), (StatusCode::OK, &body[..]));
    let reply = canned.http.post("/moderations", &json!({"input": "x"})).await;
    assert_eq!((reply.status, &reply.body[..]), (StatusCode::OK, &body[..]));
}

#[tokio::test]
async fn head_has_the_headers_of_get_and_no_body() {
    let canned =
        Canned::new("HTTP/1.1 200 OK\r\ncontent-type: audio/mpeg\r\ncontent-length: 5000\r\n\r\n").await;
    let reply = raw(
        canned.address(),
        "HEAD /v1/files/file-1/content HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    )
    .await;
    assert!(reply.starts_with("HTTP/1.1 200 "), "{reply}");
    assert!(reply.to_lowercase().contains("content-length: 5000") && reply.ends_with("\r\n\r\n"), "{reply}");
    assert!(canned.seen()[0].starts_with("HEAD /v1/files/file-1/content "));
    assert!(canned.proxy.entries().await.is_empty(), "nothing was bought");
}

#[tokio::test]
async fn options_and_answers_without_a_body_pass() {
    let canned = Canned::new("HTTP/1.1 204 No Content\r\nallow: POST, OPTIONS\r\n\r\n").await;
    for path in ["/v1/chat/completions", "/v1/anything"] {
        let request = format!("OPTIONS {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        let reply = raw(canned.address(), &request).await;
        assert!(reply.starts_with("HTTP/1.1 204 ") && reply.contains("allow: POST, OPTIONS"), "{reply}");
    }
    let canned = Canned::new("HTTP/1.1 304 Not Modified\r\netag: \"a\"\r\ncontent-length: 9\r\n\r\n").await;
    let reply = raw(canned.address(), "GET /v1/files HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
    assert!(reply.starts_with("HTTP/1.1 304 ") && reply.ends_with("\r\n\r\n"), "{reply}");
}

#[tokio::test]
async fn an_upload_that_waits_to_be_told_is_told_to_go_on() {
    let between = between().await;
    let form = "--b\r\ncontent-disposition: form-data; name=\"model\"\r\n\r\ngpt-4o-mini-transcribe\r\n\
                --b\r\ncontent-disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\nRIFF\r\n--b--\r\n";
    let head = format!(
        "POST /v1/audio/transcriptions HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=b\r\n\
         connection: close\r\nexpect: 100-continue\r\ncontent-length: {}\r\n\r\n",
        form.len()
    );
    let mut stream = TcpStream::connect(between.proxy.address()).await.unwrap();
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut told = [0; 25];
    stream.read_exact(&mut told).await.unwrap();
    assert_eq!(&told, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(form.as_bytes()).await.unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).await.unwrap();
    assert!(reply.starts_with("HTTP/1.1 200 "), "{reply}");
    assert_eq!(between.api.calls()[0].header("expect"), "");
}

#[tokio::test]
async fn azures_paths_are_routed_by_their_deployment_and_pass_as_they_are() {
    let body = br#"{"model":"gpt-4o-mini-2024-07-18","choices":[],"usage":{"prompt_tokens":1000,"completion_tokens":500}}"#;
    let canned = Canned::new(answer("content-type: application/json", body)).await;
    let http = crate::support::Http::new(&format!("http://{}", canned.address()));
    let chat = json!({"messages": [{"role": "user", "content": "x"}]}).to_string();
    let path = "/openai/deployments/gpt-4o-mini/chat/completions?api-version=2024-10-21";
    let request = http.request(Method::POST, path).header("api-key", "secret");
    let request = request.header("content-type", "application/json");
    assert_eq!(http.send(request, chat.clone().into()).await.status, StatusCode::OK);
    let seen = canned.seen().remove(0);
    assert!(seen.starts_with(&format!("POST {path} HTTP/1.1\r\n")), "{seen}");
    assert!(seen.contains("api-key: secret") && seen.ends_with(&chat), "{seen}");
    let entry = canned.proxy.entries().await.remove(0);
    assert_eq!((&*entry.endpoint, &*entry.requested_model), ("chat_completions", "gpt-4o-mini"));
    assert_eq!(entry.cost.as_nanos(), 1000 * 150 + 500 * 600);

    let named = json!({"model": "gpt-4o-mini", "messages": []});
    let reply = http.post("/openai/v1/chat/completions", &named).await;
    assert_eq!(reply.status, StatusCode::OK);
    assert!(canned.seen()[1].starts_with("POST /openai/v1/chat/completions "));
    assert_eq!(canned.proxy.entries().await.len(), 2);
}
