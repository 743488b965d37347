//! The pool of upstream connections against servers that behave and misbehave.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use breakeven::upstream::delivery::Delivery;
use breakeven::upstream::http1::WireError;
use breakeven::upstream::pool::{Pool, PoolSettings, PooledBody, SendError};
use bytes::Bytes;
use http::{HeaderMap, Method, Response};
use http_body_util::BodyExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

/// A server that runs `script` with each connection and its number, from 0.
async fn server<F, S>(script: S) -> (Pool, Arc<AtomicUsize>)
where
    F: Future<Output = ()> + Send,
    S: Fn(TcpStream, usize) -> F + Send + Sync + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let connections = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&connections);
    let script = Arc::new(script);
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let number = counter.fetch_add(1, Ordering::SeqCst);
            let script = Arc::clone(&script);
            tokio::spawn(async move { script(stream, number).await });
        }
    });
    (pool(&format!("http://{address}/v1"), Duration::from_secs(4)), connections)
}

fn pool(base_url: &str, idle_timeout: Duration) -> Pool {
    let settings = PoolSettings { connect_timeout: Duration::from_secs(2), idle_timeout, max_idle: 8 };
    Pool::new(base_url, settings).unwrap()
}

/// Reads one request with a `content-length` body; `None` when the client has closed.
async fn read_request(stream: &mut TcpStream) -> Option<String> {
    let mut request = Vec::new();
    loop {
        if stream.read_buf(&mut request).await.ok()? == 0 {
            return None;
        }
        let text = String::from_utf8_lossy(&request);
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length = head.split("content-length: ").nth(1).and_then(|rest| rest.lines().next()?.parse().ok());
        if body.len() >= length.unwrap_or(0) {
            return Some(text.into_owned());
        }
    }
}

async fn post(pool: &Pool, body: &str) -> Result<Response<PooledBody>, SendError> {
    let body = Bytes::copy_from_slice(body.as_bytes());
    pool.send(&Method::POST, "/chat/completions", &HeaderMap::new(), body, &Delivery::default()).await
}

/// Whether a request was sent in full, as far as its sender knows.
async fn is_delivered(pool: &Pool) -> bool {
    let delivery = Delivery::default();
    let body = Bytes::from_static(b"{}");
    drop(pool.send(&Method::POST, "/chat/completions", &HeaderMap::new(), body, &delivery).await);
    delivery.is_complete()
}

async fn text(response: Response<PooledBody>) -> String {
    String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
}

#[tokio::test]
async fn calls_one_after_another_share_a_connection() {
    let (pool, connections) = server(|mut stream, _| async move {
        while let Some(request) = read_request(&mut stream).await {
            assert!(request.starts_with("POST /v1/chat/completions HTTP/1.1\r\n"), "{request}");
            stream.write_all(OK.as_bytes()).await.unwrap();
        }
    })
    .await;
    for _ in 0..5 {
        assert_eq!(text(post(&pool, "{}").await.unwrap()).await, "ok");
    }
    assert_eq!((connections.load(Ordering::SeqCst), pool.idle_connections()), (1, 1));
}

#[tokio::test]
async fn a_connection_that_the_server_closed_between_calls_is_replaced() {
    let (pool, connections) = server(|mut stream, _| async move {
        // One request a connection, without saying so.
        read_request(&mut stream).await;
        stream.write_all(OK.as_bytes()).await.unwrap();
    })
    .await;
    for _ in 0..3 {
        assert_eq!(text(post(&pool, "{}").await.unwrap()).await, "ok");
    }
    assert_eq!(connections.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn a_reused_connection_that_dies_under_a_request_is_replaced_once() {
    let (pool, connections) = server(|mut stream, number| async move {
        read_request(&mut stream).await;
        stream.write_all(OK.as_bytes()).await.unwrap();
        if number == 0 {
            // Takes the second request, then closes without a byte.
            read_request(&mut stream).await;
            return;
        }
        while read_request(&mut stream).await.is_some() {
            stream.write_all(OK.as_bytes()).await.unwrap();
        }
    })
    .await;
    assert_eq!(text(post(&pool, "1").await.unwrap()).await, "ok");
    assert_eq!(text(post(&pool, "2").await.unwrap()).await, "ok");
    assert_eq!(connections.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_fresh_connection_that_dies_under_a_request_is_an_error() {
    let (pool, connections) = server(|mut stream, _| async move {
        read_request(&mut stream).await;
    })
    .await;
    let error = post(&pool, "{}").await.unwrap_err();
    assert!(matches!(error, SendError::Wire(WireError::Closed)), "{error:?}");
    assert_eq!(connections.load(Ordering::SeqCst), 1);
    assert!(is_delivered(&pool).await, "the server may have begun with it");
}

#[tokio::test]
async fn what_no_server_has_seen_is_not_delivered() {
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    assert!(!is_delivered(&pool(&format!("http://{closed}/v1"), Duration::from_secs(4))).await);
    // Takes one request, and goes away under the second one, on the same connection: that it has not seen.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let pool = pool(&format!("http://{}/v1", listener.local_addr().unwrap()), Duration::from_secs(4));
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        drop(listener);
        read_request(&mut stream).await;
        stream.write_all(OK.as_bytes()).await.unwrap();
        read_request(&mut stream).await;
    });
    assert_eq!(text(post(&pool, "1").await.unwrap()).await, "ok");
    assert!(!is_delivered(&pool).await);
}

#[tokio::test]
async fn events_that_arrive_together_are_one_frame_and_the_connection_comes_back() {
    let (pool, _) = server(|mut stream, _| async move {
        while read_request(&mut stream).await.is_some() {
            let answer = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n9\r\ndata: 2\n\n\r\n0\r\n\r\n";
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    })
    .await;
    let mut body = post(&pool, "{}").await.unwrap().into_body();
    let frame = body.frame().await.unwrap().unwrap().into_data().unwrap();
    assert_eq!(frame, "data: 1\n\ndata: 2\n\n");
    assert!(body.frame().await.is_none());
    assert_eq!(pool.idle_connections(), 1);
}

#[tokio::test]
async fn a_body_says_whether_the_socket_had_more() {
    const LENGTH: usize = 1 << 20;
    let (pool, _) = server(|mut stream, number| async move {
        read_request(&mut stream).await;
        let chunk = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n";
        let large = format!("HTTP/1.1 200 OK\r\ncontent-length: {LENGTH}\r\n\r\n{}", "a".repeat(LENGTH));
        let answer = if number == 0 { chunk } else { &large };
        stream.write_all(answer.as_bytes()).await.unwrap();
        read_request(&mut stream).await;
    })
    .await;
    let mut event = post(&pool, "{}").await.unwrap().into_body();
    assert_eq!(event.frame().await.unwrap().unwrap().into_data().unwrap(), "data: 1\n\n");
    assert!(event.is_drained());
    let mut large = post(&pool, "{}").await.unwrap().into_body();
    let first = large.frame().await.unwrap().unwrap().into_data().unwrap();
    assert!(!large.is_drained());
    let rest = large.collect().await.unwrap().to_bytes();
    assert_eq!(first.len() + rest.len(), LENGTH);
}

#[tokio::test]
async fn a_body_dropped_before_its_end_closes_the_connection() {
    let (hung_up, seen) = tokio::sync::oneshot::channel();
    let hung_up = std::sync::Mutex::new(Some(hung_up));
    let (pool, _) = server(move |mut stream, _| {
        let hung_up = hung_up.lock().unwrap().take();
        async move {
            read_request(&mut stream).await;
            let start = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n";
            stream.write_all(start.as_bytes()).await.unwrap();
            let closed = read_request(&mut stream).await.is_none();
            hung_up.unwrap().send(closed).unwrap();
        }
    })
    .await;
    let mut body = post(&pool, "{}").await.unwrap().into_body();
    body.frame().await.unwrap().unwrap();
    drop(body);
    assert!(seen.await.unwrap());
    assert_eq!(pool.idle_connections(), 0);
}

#[tokio::test]
async fn an_answer_that_is_cut_is_an_error_and_not_an_end() {
    let (pool, _) = server(|mut stream, _| async move {
        read_request(&mut stream).await;
        let start = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n";
        stream.write_all(start.as_bytes()).await.unwrap();
    })
    .await;
    let error = post(&pool, "{}").await.unwrap().into_body().collect().await.unwrap_err();
    assert!(matches!(error, WireError::Truncated), "{error:?}");
}

#[tokio::test]
async fn a_refusal_before_the_whole_request_was_read_reaches_the_caller() {
    let (pool, _) = server(|mut stream, _| async move {
        let mut first = [0; 1024];
        stream.read_exact(&mut first).await.unwrap();
        let refusal = "HTTP/1.1 413 Too Large\r\nconnection: close\r\ncontent-length: 3\r\n\r\nbig";
        stream.write_all(refusal.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        // Lets the client read before unread bytes turn the close into a reset.
        tokio::io::copy(&mut stream, &mut tokio::io::sink()).await.unwrap();
    })
    .await;
    let response = post(&pool, &"x".repeat(16 << 20)).await.unwrap();
    assert_eq!(response.status(), 413);
    assert_eq!(text(response).await, "big");
    assert_eq!(pool.idle_connections(), 0);
}

#[tokio::test]
async fn informational_answers_are_passed_over() {
    let (pool, _) = server(|mut stream, _| async move {
        read_request(&mut stream).await;
        let answer = format!("HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n{OK}");
        stream.write_all(answer.as_bytes()).await.unwrap();
    })
    .await;
    let response = post(&pool, "{}").await.unwrap();
    assert!(response.headers().get("link").is_none());
    assert_eq!(text(response).await, "ok");
}

#[tokio::test]
async fn a_body_without_framing_ends_with_the_connection() {
    let (pool, _) = server(|mut stream, _| async move {
        read_request(&mut stream).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\nall of it").await.unwrap();
    })
    .await;
    assert_eq!(text(post(&pool, "{}").await.unwrap()).await, "all of it");
    assert_eq!(pool.idle_connections(), 0);
}

#[tokio::test]
async fn large_bodies_cross_unharmed_both_ways() {
    let (pool, _) = server(|mut stream, _| async move {
        while let Some(request) = read_request(&mut stream).await {
            let body = request.split_once("\r\n\r\n").unwrap().1;
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
            stream.write_all(head.as_bytes()).await.unwrap();
            stream.write_all(body.as_bytes()).await.unwrap();
        }
    })
    .await;
    let body: String =
        (0..200_000).map(|number| char::from(b'a' + u8::try_from(number % 26).unwrap())).collect();
    for _ in 0..2 {
        assert!(text(post(&pool, &body).await.unwrap()).await == body);
    }
    assert_eq!(pool.idle_connections(), 1);
}

#[tokio::test]
async fn connections_that_rest_too_long_are_closed() {
    let (pool, connections) = server(|mut stream, _| async move {
        while read_request(&mut stream).await.is_some() {
            stream.write_all(OK.as_bytes()).await.unwrap();
        }
    })
    .await;
    assert_eq!(text(post(&pool, "{}").await.unwrap()).await, "ok");
    pool.close_expired();
    assert_eq!(pool.idle_connections(), 1);

    let impatient = self::pool(&pool.base_url(), Duration::ZERO);
    for _ in 0..2 {
        assert_eq!(text(post(&impatient, "{}").await.unwrap()).await, "ok");
    }
    assert_eq!(connections.load(Ordering::SeqCst), 3);
    impatient.close_expired();
    assert_eq!(impatient.idle_connections(), 0);
}

#[tokio::test]
async fn an_address_where_nobody_listens_is_a_connect_error() {
    let address = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let error = post(&pool(&format!("http://{address}"), Duration::from_secs(4)), "{}").await.unwrap_err();
    assert!(matches!(error, SendError::Connect { .. }), "{error:?}");
}

#[test]
fn only_http_urls_have_a_pool() {
    let settings =
        PoolSettings { connect_timeout: Duration::ZERO, idle_timeout: Duration::ZERO, max_idle: 1 };
    for url in ["https://api.openai.com/v1", "api.openai.com", "http://user@host/v1", "/v1", ""] {
        assert!(Pool::new(url, settings.clone()).is_err(), "{url}");
    }
}
