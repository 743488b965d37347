//! What is compared: the API's price against a rented machine, from flags, or from a route of the config.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use clap::{Args, ValueEnum};

use crate::config::{self, BackendKind, Config, Route, parse_duration};
use crate::economics::{
    Band, Billing, NanoUsd, PolicyKind, PolicySettings, PoolSpec, PriceCard, Prices, Threshold, TokenPrice,
};

/// The API model and the machine to compare. Without a configuration: gpt-4o-mini against an 8B model on one
/// H100; every flag overrides one number.
#[derive(Debug, Clone, Default, Args)]
pub struct EconomyArgs {
    /// Take prices, machine and policy from this configuration.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Route of the configuration; may be left out when there is only one with a machine of its own.
    #[arg(long, value_name = "ROUTE")]
    pub route: Option<String>,
    /// API price of input, USD per million tokens.
    #[arg(long, value_name = "USD", value_parser = price, help_heading = "Economy")]
    pub api_input_usd_per_million: Option<TokenPrice>,
    /// API price of cached input, USD per million tokens; without it, that of input.
    #[arg(long, value_name = "USD", value_parser = price, help_heading = "Economy")]
    pub api_cached_input_usd_per_million: Option<TokenPrice>,
    /// API price of output, USD per million tokens.
    #[arg(long, value_name = "USD", value_parser = price, help_heading = "Economy")]
    pub api_output_usd_per_million: Option<TokenPrice>,
    /// Rent of one replica, USD an hour.
    #[arg(long, value_name = "USD", help_heading = "Economy")]
    pub hourly_usd: Option<NanoUsd>,
    /// When the rent is due.
    #[arg(long, value_enum, help_heading = "Economy")]
    pub billing: Option<BillingName>,
    /// Fee paid for each self-hosted request, USD.
    #[arg(long, value_name = "USD", help_heading = "Economy")]
    pub request_usd: Option<NanoUsd>,
    /// Input tokens a second that one replica takes in.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), help_heading = "Economy")]
    pub input_tokens_per_second: Option<u64>,
    /// Output tokens a second that one replica writes.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), help_heading = "Economy")]
    pub output_tokens_per_second: Option<u64>,
    /// From the order until a replica is ready.
    #[arg(long, value_name = "DURATION", value_parser = duration, help_heading = "Economy")]
    pub startup: Option<Duration>,
    /// Shortest time that is billed.
    #[arg(long, value_name = "DURATION", value_parser = duration, help_heading = "Economy")]
    pub minimum: Option<Duration>,
    /// Most replicas that may run at once.
    #[arg(long, value_name = "N", help_heading = "Economy")]
    pub max_replicas: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum BillingName {
    Committed,
    WhileRunning,
    PerUse,
}

impl From<BillingName> for Billing {
    fn from(name: BillingName) -> Self {
        match name {
            BillingName::Committed => Self::Committed,
            BillingName::WhileRunning => Self::WhileRunning,
            BillingName::PerUse => Self::PerUse,
        }
    }
}

/// The dearest price of a million tokens, USD: more than ten times what any costs.
const DEAREST: TokenPrice = TokenPrice::from_pico_per_token(10_000_000_000);

fn price(text: &str) -> Result<TokenPrice, String> {
    let price = TokenPrice::from_usd_per_million(text).map_err(|error| error.to_string())?;
    if price <= DEAREST { Ok(price) } else { Err("it is more than 10,000 USD a million tokens".into()) }
}

/// A duration on the command line: `90s`, `5m`, `14d`.
pub fn duration(text: &str) -> Result<Duration, String> {
    parse_duration(text).ok_or_else(|| "write a number and its unit, as `90s`, `5m` or `14d`".to_owned())
}

/// A duration that is not zero.
pub fn positive_duration(text: &str) -> Result<Duration, String> {
    duration(text)
        .and_then(|length| if length.is_zero() { Err("it must be above zero".into()) } else { Ok(length) })
}

/// An API model, a machine, and how the route decides between them.
#[derive(Debug, Clone)]
pub struct Economy {
    /// How tables name the two sides.
    pub api_name: String,
    pub pool_name: String,
    pub card: PriceCard,
    pub pool: PoolSpec,
    /// The route's, when it has one.
    pub threshold: Option<Threshold>,
    pub settings: PolicySettings,
    pub route: Option<String>,
    pub ledger: Option<PathBuf>,
}

impl Default for Economy {
    fn default() -> Self {
        let price = TokenPrice::from_pico_per_token;
        Self {
            api_name: "gpt-4o-mini".into(),
            pool_name: "8B on one H100".into(),
            card: PriceCard {
                standard: Prices {
                    cached_input: price(75_000),
                    ..Prices::flat(price(150_000), price(600_000))
                },
                ..PriceCard::default()
            },
            pool: PoolSpec::small_model_on_an_h100(),
            threshold: None,
            settings: PolicySettings::default(),
            route: None,
            ledger: None,
        }
    }
}

impl Economy {
    /// The route's threshold, or one around the rent of one replica with a band of a tenth.
    pub fn threshold_policy(&self) -> PolicyKind {
        let daily = self.pool.hourly.to_usd_f64() * 24.0;
        let band = Band { up: daily * 1.1, down: daily * 0.9 };
        let around_rent = || Threshold { usd_per_day: Some(band), ..Threshold::default() };
        PolicyKind::Threshold(self.threshold.clone().unwrap_or_else(around_rent))
    }
}

impl EconomyArgs {
    pub fn economy(&self) -> anyhow::Result<Economy> {
        let mut economy = match (&self.config, &self.route) {
            (None, None) => Economy::default(),
            (file, route) => of_config(file.as_deref(), route.as_deref())?,
        };
        self.apply(&mut economy);
        Ok(economy)
    }

    fn apply(&self, economy: &mut Economy) {
        let prices = &mut economy.card.standard;
        if self.api_input_usd_per_million.is_some() || self.api_output_usd_per_million.is_some() {
            let input = self.api_input_usd_per_million.unwrap_or(prices.input);
            let flat = Prices::flat(input, self.api_output_usd_per_million.unwrap_or(prices.output));
            economy.card = PriceCard { standard: flat, ..PriceCard::default() };
            economy.api_name = "api".into();
        }
        set(&mut economy.card.standard.cached_input, self.api_cached_input_usd_per_million);
        let pool = &mut economy.pool;
        set(&mut pool.hourly, self.hourly_usd);
        set(&mut pool.billing, self.billing.map(Billing::from));
        set(&mut pool.request_fee, self.request_usd);
        set(&mut pool.capacity.input_tokens_per_second, self.input_tokens_per_second);
        set(&mut pool.capacity.output_tokens_per_second, self.output_tokens_per_second);
        set(&mut pool.startup, self.startup);
        set(&mut pool.minimum, self.minimum);
        set(&mut pool.max_replicas, self.max_replicas);
        if self.hourly_usd.is_some() && economy.route.is_none() {
            economy.pool_name = "self_hosted".into();
        }
    }
}

fn set<T>(place: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *place = value;
    }
}

fn of_config(file: Option<&Path>, route: Option<&str>) -> anyhow::Result<Economy> {
    let path = config::find(file).context("there is no configuration; name one with `--config`")?;
    let config = Config::load_without_secrets(&path).map_err(|problems| anyhow!("{problems}"))?;
    let route = chosen_route(&config, route)?;
    economy_of_route(&config, route)
}

fn chosen_route<'a>(config: &'a Config, name: Option<&str>) -> anyhow::Result<&'a Route> {
    let has_pool =
        |route: &&Route| route.offers.iter().any(|offer| config.backend(offer.backend).pool().is_some());
    if let Some(name) = name {
        return config
            .routes
            .iter()
            .find(|route| route.name == name)
            .with_context(|| format!("there is no route `{name}` in the configuration"));
    }
    let mut candidates = config.routes.iter().filter(has_pool);
    match (candidates.next(), candidates.next()) {
        (Some(only), None) => Ok(only),
        (None, _) => bail!("no route of the configuration has a self-hosted offer"),
        (Some(_), Some(_)) => bail!("the configuration has several routes; choose one with `--route`"),
    }
}

/// The API offer and the first self-hosted offer of a route.
pub fn economy_of_route(config: &Config, route: &Route) -> anyhow::Result<Economy> {
    let offer =
        |own: bool| {
            let side = if own { "a self-hosted" } else { "an API" };
            let is = |kind: &BackendKind| matches!(kind, BackendKind::SelfHosted(_)) == own;
            route.offers.iter().find(|offer| is(&config.backend(offer.backend).kind)).with_context(|| {
                format!("route `{}` has no offer of {side} backend to compare with", route.name)
            })
        };
    let (api, own) = (offer(false)?, offer(true)?);
    let model = api.model.as_ref().or(route.models.first()).context("the route has no model")?;
    let card = api
        .price
        .as_ref()
        .or_else(|| config.prices.card(model))
        .with_context(|| format!("there is no price for `{model}`; give the offer one"))?;
    let backend = config.backend(own.backend);
    let threshold = match &route.policy {
        PolicyKind::Threshold(threshold) => Some(threshold.clone()),
        _ => None,
    };
    Ok(Economy {
        api_name: model.clone(),
        pool_name: backend.name.clone(),
        card: card.clone(),
        pool: backend.pool().context("a self-hosted backend has a pool")?.clone(),
        threshold,
        settings: config.policy.clone(),
        route: Some(route.name.clone()),
        ledger: Some(config.ledger.path.clone()),
    })
}
