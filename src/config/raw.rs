//! The configuration as it is written: every key with its type and its comment, nothing checked but types.
//!
//! The comments are the descriptions of the JSON Schema (`breakeven schema`), so each states its unit and
//! its default.

use super::dialect::Server as ServerSoftware;
use super::read::{At, Named, tables, words};
use super::scalar::{Count, HeaderValue, Number, OneOrMore, PerMillion, SecretReference, Size, Time, Usd};
use super::{Addresses, AuthMode, BudgetPeriod, Fsync, LogFormat, UnknownPrice, WhenSpent, WhenUnavailable};
use crate::economics::Billing;

tables! {
    /// breakeven: a proxy that sends each call to the OpenAI API or to your own GPU, whichever costs less.
    RawConfig {
        /// Where it listens.
        server: At<RawServer>,
        /// What clients may occupy.
        limits: At<RawLimits>,
        /// Who may call.
        auth: At<RawAuth>,
        /// What calls may cost together, by name.
        budgets: Named<RawBudget>,
        /// Where every call is recorded.
        ledger: At<RawLedger>,
        /// One volume, one set of budgets and one planner over many proxies. Default: this proxy is alone.
        shared: At<RawShared>,
        /// When traffic changes sides.
        policy: At<RawPolicy>,
        /// Further attempts before the client has had a byte.
        retry: At<RawRetry>,
        /// What is measured.
        metrics: At<RawMetrics>,
        /// What is logged.
        log: At<RawLog>,
        /// Where spans go.
        telemetry: At<RawTelemetry>,
        /// What tokens cost at API backends.
        prices: At<RawPrices>,
        /// The endpoints that serve models, by name. The first `api` backend also serves what no route names.
        backends: Named<RawBackend>,
        /// The models that clients ask for, and who may serve them, by name.
        routes: Named<RawRoute>,
    }

    /// Where it listens.
    RawServer {
        /// Address for applications. Default: `127.0.0.1:4000`.
        listen: At<String>,
        /// Address for `/metrics`, `/livez`, `/readyz`, `/api/*` and the live page. Default: `127.0.0.1:4001`.
        admin_listen: At<String>,
        /// Bearer token of the admin side. Without one it may listen on loopback only.
        admin_token: At<SecretReference>,
        /// Certificate for `listen`. Default: plain HTTP.
        tls: At<RawTls>,
        /// Certificate for `admin_listen`, which may be the same. Default: plain HTTP.
        admin_tls: At<RawTls>,
        /// Threads that serve applications. Default: one a core.
        workers: At<Count>,
    }

    /// A certificate and its key, in PEM; read again when they change.
    RawTls {
        /// Certificate chain, the server's own first.
        certificate: At<String>,
        /// Private key of the first certificate.
        private_key: At<String>,
    }

    /// What clients may occupy.
    RawLimits {
        /// Connections open at once; more are closed as they come. Default: 16384.
        max_connections: At<Count>,
        /// Calls under way at once; more are answered 503 with `Retry-After`. Default: 8192.
        max_in_flight: At<Count>,
        /// Share of both that one caller may hold while it is alone; several that flood get equal parts. Default: 0.9.
        caller_share: At<Number>,
        /// Largest request body that is read; larger ones are answered 413. Default: `32MiB`.
        max_body_bytes: At<Size>,
        /// Largest upload, which passes through without being held: files, audio, images. Default: `512MiB`, as OpenAI's.
        max_upload_bytes: At<Size>,
        /// What the request bodies above 64 KiB of all calls may take together; beyond it, 503. Default: `512MiB`.
        max_buffered_bytes: At<Size>,
        /// Largest request head. Default: `64KiB`.
        max_header_bytes: At<Size>,
        /// Longest time for a request head to arrive. Default: `10s`.
        header_timeout: At<Time>,
        /// Longest time for a request body to arrive; of an upload, longest pause between two pieces. Default: `2m`.
        body_timeout: At<Time>,
        /// Longest time a connection may be idle between requests, or a client may leave an answer unread. Default: `75s`.
        idle_timeout: At<Time>,
        /// How long open streams may go on after SIGTERM. Default: `10m`.
        drain_timeout: At<Time>,
    }

    /// Who may call.
    RawAuth {
        /// `pass_through`: the client's own key goes to the first API backend, and only there; `keys`: clients hold virtual keys made by `breakeven keys create`. Default: `pass_through`.
        mode: At<AuthMode>,
    }

    /// What some calls may cost together. At most one of `team`, `route` and `key`; without one it counts all calls.
    RawBudget {
        /// Calls of this team.
        team: At<String>,
        /// Calls of this route.
        route: At<String>,
        /// Calls with this virtual key, by its public id (`key_..`).
        key: At<String>,
        /// Most that they may cost in a period, in USD.
        usd: At<Usd>,
        /// `day` and `month` of UTC, or `lifetime`. Default: `month`.
        period: At<BudgetPeriod>,
        /// When nothing is left, `refuse` calls with 429, or send them to the self-hosted backend only (`cheaper_backend`). Default: `refuse`.
        when_spent: At<WhenSpent>,
    }

    /// Where every call is recorded.
    RawLedger {
        /// SQLite file, from the working directory. Default: `breakeven.db`.
        path: At<String>,
        /// `always`: the last byte of a response waits for the disk; `batch`: rows are synced in groups, and a power cut can lose the last group. Default: `batch`.
        fsync: At<Fsync>,
        /// While it cannot record, `refuse` new calls with 503 or `continue` and count what is unrecorded. Default: `refuse`.
        when_unavailable: At<WhenUnavailable>,
        /// A copy of every row in one Postgres database, for many proxies. Default: none.
        postgres: At<RawPostgres>,
    }

    /// A Postgres database that a copy of every row goes to.
    RawPostgres {
        /// The server as `postgres://user:password@host:5432/database?sslmode=verify-full`, which is a secret. `sslmode` is `verify-full` or `disable`; default: `disable` on this machine, else `verify-full`.
        url: At<SecretReference>,
        /// Certificates that the server's is verified against, in PEM. Default: the public authorities.
        ca_file: At<String>,
        /// What this proxy is called in the table `ledgers`. Default: the name of its host.
        instance: At<String>,
        /// Most rows of one transaction, 1 to 20000. Default: 2000.
        batch_rows: At<Count>,
        /// Longest time to connect. Default: `10s`.
        connect_timeout: At<Time>,
        /// Longest time of one statement. Default: `30s`.
        statement_timeout: At<Time>,
    }

    /// What many proxies have in common, through Redis or Valkey.
    RawShared {
        /// URL of the server, `redis://` or with TLS `rediss://`, password included: `rediss://:password@host:6379/0`.
        redis: At<SecretReference>,
        /// File with the certificate authorities that the server's certificate may be from, in PEM. Default: the system's.
        ca: At<String>,
        /// What all keys begin with; proxies with another prefix are strangers. Default: `breakeven:`.
        prefix: At<String>,
        /// How often a proxy tells the others and hears of them; at most a quarter of `policy.slot`. Default: `500ms`, or that quarter.
        refresh: At<Time>,
        /// A proxy that was not heard for so long is taken for dead: the planner's lease and what it had reserved of budgets go to others. Default: `6s`.
        lease: At<Time>,
        /// To connect, TLS included. Default: `2s`.
        connect_timeout: At<Time>,
        /// To answer one exchange. Default: `1s`.
        timeout: At<Time>,
    }

    /// When traffic changes sides.
    RawPolicy {
        /// What "current volume" means: the time that it is averaged over. Default: `10m`.
        window: At<Time>,
        /// Hysteresis: a change must be worth this share of the cost, 0 to below 1. Default: 0.10.
        margin: At<Number>,
        /// Shortest time between two changes. Default: `5m`.
        min_dwell: At<Time>,
        /// How often it is decided. Default: `60s`.
        slot: At<Time>,
    }

    /// Further attempts before the client has had a byte.
    RawRetry {
        /// Attempts of one call in all, over all backends. Default: 3.
        max_attempts: At<Count>,
        /// Pause before the second attempt at the same backend; doubles each time, with jitter. Default: `200ms`.
        backoff: At<Time>,
        /// Longest such pause; a longer `Retry-After` moves the call to another backend. Default: `5s`.
        max_backoff: At<Time>,
        /// Retries of the whole process as a share of its calls, 0 to 1. Default: 0.2.
        budget_ratio: At<Number>,
    }

    /// What is measured.
    RawMetrics {
        /// Values of the tag `team` that become a metric label; others are counted as `other`. Default: none.
        teams: At<Vec<At<String>>>,
        /// Most time series in all; beyond it labels become `other`. Default: 2000.
        max_series: At<Count>,
    }

    /// What is logged.
    RawLog {
        /// A level, or levels by module: `info`, `breakeven=debug,hyper=warn`. Default: `info`.
        filter: At<String>,
        /// `text` for people, `json` for machines. Default: `text`.
        format: At<LogFormat>,
    }

    /// Where spans go. Only in builds with the feature `otel`.
    RawTelemetry {
        /// Endpoint that takes a span for each call, by OTLP over HTTP, as `http://127.0.0.1:4318`. Default: `OTEL_EXPORTER_OTLP_ENDPOINT`, if it is set; else there are no spans.
        otlp_endpoint: At<String>,
    }

    /// What tokens cost at API backends.
    RawPrices {
        /// A price file in the format of `config/prices.toml`, over the prices that ship with the program; a relative path starts at the configuration's folder.
        file: At<String>,
        /// A call whose model has no price: `reject` it with 400, send it to the API and count it as unpriced (`api_only`), or price it as the dearest known model, marked estimated (`estimate`). Default: `api_only`.
        unknown: At<UnknownPrice>,
        /// Prices by the model's name at the API, over the price file.
        models: Named<RawPriceCard>,
    }

    /// Prices of one model, in USD per million tokens.
    RawPriceCard {
        /// Input tokens.
        input: At<PerMillion>,
        /// Input tokens that were read from the provider's cache. Default: as `input`.
        cached_input: At<PerMillion>,
        /// Input tokens that were written to the provider's cache. Default: as `input`.
        cache_write: At<PerMillion>,
        /// Audio in the input. Default: as `input`.
        audio_input: At<PerMillion>,
        /// Images in the input. Default: as `input`.
        image_input: At<PerMillion>,
        /// Output tokens, reasoning included.
        output: At<PerMillion>,
        /// Audio in the output. Default: as `output`.
        audio_output: At<PerMillion>,
        /// Images in the output. Default: as `output`.
        image_output: At<PerMillion>,
        /// Prices of the batch tier. Default: as standard.
        batch: At<RawPriceTier>,
        /// Prices of the flex tier. Default: as standard.
        flex: At<RawPriceTier>,
        /// Prices of the priority tier. Default: as standard.
        priority: At<RawPriceTier>,
        /// Prices of the ultrafast tier. Default: as standard.
        ultrafast: At<RawPriceTier>,
        /// Dearer prices of calls with a long input. Default: none.
        long_context: At<RawLongContext>,
    }

    /// Prices of one tier, in USD per million tokens. Without `input` or `output` they are as in the standard tier; cached input that is not written costs what input costs.
    RawPriceTier {
        /// Input tokens.
        input: At<PerMillion>,
        /// Cached input tokens.
        cached_input: At<PerMillion>,
        /// Output tokens.
        output: At<PerMillion>,
    }

    /// Prices of the whole call when its input is long, in USD per million tokens.
    RawLongContext {
        /// They are in force above so many input tokens.
        above_input_tokens: At<Count>,
        /// Input tokens.
        input: At<PerMillion>,
        /// Cached input tokens.
        cached_input: At<PerMillion>,
        /// Output tokens.
        output: At<PerMillion>,
    }

    /// One endpoint that serves models.
    RawBackend {
        /// `api`: paid per token; `self_hosted`: rented by the hour.
        kind: At<Kind>,
        /// Its OpenAI-compatible base URL, `/v1` included; for a self-hosted backend a list may give one per replica, or `{replica}` and `{8000+replica}` stand for the replica's number, counted from 0.
        base_url: At<OneOrMore>,
        /// Self-hosted: `urls`: each base URL is a replica, or a load balancer; `dns`: the base URL's host is a name, each of whose addresses is a replica. Default: `urls`.
        addresses: At<Addresses>,
        /// Key that is sent to it. Without one, `pass_through` sends the client's own key to an API backend, and none to a self-hosted one.
        api_key: At<SecretReference>,
        /// Certificates that its own is verified against, in PEM. Default: the public authorities.
        ca_file: At<String>,
        /// API: key that may read the organisation's costs (an admin key of OpenAI); with it each closed day is compared with the provider's invoice. Default: none.
        costs_key: At<SecretReference>,
        /// API: ids of the projects whose costs are compared. Default: the whole organisation.
        costs_projects: At<Vec<At<String>>>,
        /// Headers that are added to every request; credentials among them must be references.
        headers: Named<HeaderValue>,
        /// Separate time limits.
        timeouts: At<RawTimeouts>,
        /// Active health checks.
        health: At<RawHealth>,
        /// When a failing backend is left alone.
        circuit: At<RawCircuit>,
        /// What is done with members of the request body that it cannot take: `"pass"`, `"drop"`, `"refuse"` (the call goes elsewhere) or `{ rename = ".." }`.
        parameters: Named<ParameterTreatment>,
        /// Whether `stream_options` may be sent to it. Default: true.
        stream_options: At<bool>,
        /// Self-hosted: the server software, which sets the defaults for `health`, `metrics`, `parameters` and what offers support. Default: `vllm`.
        server: At<ServerSoftware>,
        /// Self-hosted: rent of one replica for one hour, in USD.
        hourly_usd: At<Usd>,
        /// Self-hosted: `committed`: paid anyway; `while_running`: paid while up; `per_use`: paid per second of work. Default: `while_running`.
        billing: At<Billing>,
        /// Self-hosted: glue paid per request, in USD. Default: 0.
        request_usd: At<Usd>,
        /// Self-hosted: what one replica sustains.
        capacity: At<RawCapacity>,
        /// Self-hosted: from the order to start until a replica is ready. Default: `5m`.
        startup: At<Time>,
        /// Self-hosted: shortest time that is billed. Default: `1m`.
        minimum: At<Time>,
        /// Self-hosted: most replicas. Default: the number of base URLs.
        max_replicas: At<Count>,
        /// Self-hosted: who starts and stops replicas. Default: `"none"`.
        control: At<ControlChoice>,
        /// Self-hosted: path (below the host) or URL (`{replica}` as in `base_url`) of the server's own metrics, or `""` for none. Default: by `server`.
        metrics: At<String>,
    }

    /// Time limits of one backend.
    RawTimeouts {
        /// To connect, TLS included. Default: `5s`.
        connect: At<Time>,
        /// Until the response's head, and until the first byte of a stream. Default: `10m` for an API, `5m` for a self-hosted backend.
        first_byte: At<Time>,
        /// Between two parts of a response. Default: `5m` for an API, `2m` for a self-hosted backend.
        between_bytes: At<Time>,
        /// The whole call. Default: `1h`.
        total: At<Time>,
        /// Pooled connections are closed after so long without use. Default: `90s` for an API, `4s` for a self-hosted backend.
        idle_connection: At<Time>,
    }

    /// Active health checks of one backend.
    RawHealth {
        /// Path below the host, or `""` for passive health only. Default: by `server`; none for an API.
        path: At<String>,
        /// Time between two checks. Default: `5s`.
        interval: At<Time>,
        /// A check without an answer after so long has failed. Default: `10s`.
        timeout: At<Time>,
    }

    /// When a failing backend is left alone.
    RawCircuit {
        /// Failures in a row that open the circuit. Default: 5.
        failures: At<Count>,
        /// How long it stays open before a trial. Default: `10s`.
        open_for: At<Time>,
    }

    /// What one replica sustains; `breakeven calibrate` measures it.
    RawCapacity {
        /// Fresh input tokens a second, when it does nothing else.
        input_tokens_per_second: At<Count>,
        /// Output tokens a second, when it does nothing else.
        output_tokens_per_second: At<Count>,
        /// Calls at once; more go to the API.
        max_in_flight: At<Count>,
    }

    /// Who starts and stops replicas.
    RawControl {
        /// `none`: somebody else; `command`: programs; `webhook`: signed POST requests; `kubernetes`: the scale of a workload.
        kind: At<ControlKind>,
        /// Program and arguments that start a replica; `BREAKEVEN_REPLICA` is its number.
        start: At<Vec<At<String>>>,
        /// Program and arguments that stop a replica. Without it, `start` is the server itself and gets SIGTERM.
        stop: At<Vec<At<String>>>,
        /// Where `webhook` posts to.
        url: At<String>,
        /// Key of the webhook's signature.
        secret: At<SecretReference>,
        /// Kubernetes: group and version of the workload. Default: `apps/v1`.
        api_version: At<String>,
        /// Kubernetes: the workload's kind as URLs and roles name it, `deployments` or `statefulsets` or that of a custom resource. Default: `deployments`.
        resource: At<String>,
        /// Kubernetes: the workload's name.
        name: At<String>,
        /// Kubernetes: the workload's namespace. Default: that of the credentials.
        namespace: At<String>,
        /// Kubernetes: a kubeconfig file, from the configuration's folder. Default: the credentials of the pod that breakeven runs in.
        kubeconfig: At<String>,
    }

    /// The models that clients ask for, and who may serve them.
    RawRoute {
        /// Names that clients ask for.
        models: At<Vec<At<String>>>,
        /// `cheapest`: what costs less at the current volume; `threshold`: your own numbers; `adaptive`: holds replicas by itself; `api`, `self_hosted`: always that; `split`: a share. Default: `cheapest`.
        policy: At<PolicyName>,
        /// Who may serve them, in order of preference among equals.
        offers: At<Vec<At<RawOffer>>>,
        /// For `policy = "threshold"`: whichever of these volumes is exceeded moves the route to the self-hosted backend.
        threshold: At<RawThreshold>,
        /// For `policy = "split"`: share of calls for the self-hosted backend, 0 to 1.
        self_hosted_share: At<Number>,
    }

    #[expect(clippy::struct_field_names, reason = "the keys say their unit")]
    /// Volumes a day that move a route to the self-hosted backend.
    RawThreshold {
        /// Requests a day: `{ up = 250000, down = 200000 }`, or one number.
        requests_per_day: At<RawBand>,
        /// Input and output tokens a day.
        tokens_per_day: At<RawBand>,
        /// Bill of the API a day, in USD.
        usd_per_day: At<RawBand>,
    }

    /// A threshold with its hysteresis.
    BandTable {
        /// Above it the route goes to the self-hosted backend.
        up: At<Number>,
        /// Below it the route goes back to the API. Default: 80% of `up`.
        down: At<Number>,
    }

    /// One backend's way to serve the models of a route.
    RawOffer {
        /// Name of the backend.
        backend: At<String>,
        /// The model's name there. Default: the name that the client used.
        model: At<String>,
        /// Prices of this offer, over the price book (API backends only).
        price: At<RawPriceCard>,
        /// Longest input and output together, in tokens. Default: no limit is known.
        context_window: At<Count>,
        /// Path of the model's `tokenizer.json`: counts tokens where a self-hosted server reports no usage. Default: they are estimated from bytes.
        tokenizer: At<String>,
        /// Tool calls. Default for a self-hosted backend: false, since servers need flags for them.
        tools: At<bool>,
        /// `response_format` with a JSON Schema. Default: by `server`.
        json_schema: At<bool>,
        /// Images in the input. Default for a self-hosted backend: false.
        vision: At<bool>,
        /// Audio in or out. Default for a self-hosted backend: false.
        audio: At<bool>,
        /// `logprobs`. Default: by `server`.
        logprobs: At<bool>,
        /// More than one choice (`n` above 1). Default: by `server`.
        multiple_choices: At<bool>,
        /// `/v1/embeddings`. Default for a self-hosted backend: false.
        embeddings: At<bool>,
        /// `/v1/responses`. Default: by `server`.
        responses: At<bool>,
    }

    /// The long form of what is done with a member of the request body.
    RenameTable {
        /// Send it under this name.
        rename: At<String>,
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Api,
    SelfHosted,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PolicyName {
    Threshold,
    Cheapest,
    Adaptive,
    Api,
    SelfHosted,
    Split,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ControlKind {
    None,
    Command,
    Webhook,
    Kubernetes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ParameterWord {
    Pass,
    Drop,
    Refuse,
}

words! {
    Kind { "api" => Kind::Api, "self_hosted" => Kind::SelfHosted, }
    PolicyName {
        "threshold" => PolicyName::Threshold,
        "cheapest" => PolicyName::Cheapest,
        "adaptive" => PolicyName::Adaptive,
        "api" => PolicyName::Api,
        "self_hosted" => PolicyName::SelfHosted,
        "split" => PolicyName::Split,
    }
    ControlKind {
        "none" => ControlKind::None,
        "command" => ControlKind::Command,
        "webhook" => ControlKind::Webhook,
        "kubernetes" => ControlKind::Kubernetes,
    }
    Addresses { "urls" => Addresses::Urls, "dns" => Addresses::Dns, }
    ParameterWord {
        "pass" => ParameterWord::Pass,
        "drop" => ParameterWord::Drop,
        "refuse" => ParameterWord::Refuse,
    }
    AuthMode { "pass_through" => AuthMode::PassThrough, "keys" => AuthMode::Keys, }
    BudgetPeriod {
        "day" => BudgetPeriod::Day,
        "month" => BudgetPeriod::Month,
        "lifetime" => BudgetPeriod::Lifetime,
    }
    WhenSpent { "refuse" => WhenSpent::Refuse, "cheaper_backend" => WhenSpent::CheaperBackend, }
    Fsync { "always" => Fsync::Always, "batch" => Fsync::Batch, }
    WhenUnavailable { "refuse" => WhenUnavailable::Refuse, "continue" => WhenUnavailable::Continue, }
    LogFormat { "text" => LogFormat::Text, "json" => LogFormat::Json, }
    UnknownPrice {
        "reject" => UnknownPrice::Reject,
        "api_only" => UnknownPrice::ApiOnly,
        "estimate" => UnknownPrice::Estimate,
    }
    Billing {
        "committed" => Billing::Committed,
        "while_running" => Billing::WhileRunning,
        "per_use" => Billing::PerUse,
    }
    ServerSoftware {
        "vllm" => ServerSoftware::Vllm,
        "sglang" => ServerSoftware::Sglang,
        "tgi" => ServerSoftware::Tgi,
        "llama_cpp" => ServerSoftware::LlamaCpp,
        "ollama" => ServerSoftware::Ollama,
        "other" => ServerSoftware::Other,
    }
}

/// A value that has a short form and a table.
macro_rules! short_or_table {
    ($type:ident, $about:literal, $short:ident($short_type:ty) if $is_short:ident, $long:ident($table:ty)) => {
        #[doc = $about]
        #[derive(Debug, Clone)]
        pub(super) enum $type {
            $short($short_type),
            $long(Box<$table>),
        }

        impl super::read::FromToml for $type {
            fn read(
                value: &toml::de::DeValue<'_>,
                place: &super::Place,
                findings: &mut super::problem::Findings,
            ) -> Option<Self> {
                if $is_short(value) {
                    return super::read::FromToml::read(value, place, findings).map(Self::$short);
                }
                super::read::FromToml::read(value, place, findings).map(Self::$long)
            }
        }

        impl schemars::JsonSchema for $type {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($type).into()
            }

            fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
                let short = generator.subschema_for::<$short_type>();
                let long = generator.subschema_for::<$table>();
                schemars::json_schema!({ "anyOf": [short, long] })
            }
        }
    };
}

fn is_not_a_table(value: &toml::de::DeValue<'_>) -> bool {
    !value.is_table()
}

short_or_table!(RawBand, "One number, or a band.", One(Number) if is_not_a_table, Band(BandTable));
short_or_table!(
    ParameterTreatment,
    "What is done with a member of the request body.",
    Word(ParameterWord) if is_not_a_table,
    Rename(RenameTable)
);
short_or_table!(
    ControlChoice,
    "A word, or a table.",
    Kind(ControlKind) if is_not_a_table,
    Table(RawControl)
);
