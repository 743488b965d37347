//! `plan` and `simulate` as commands: shapes that scripts rely on.

use breakeven::cli::{Cli, Command};
use breakeven::commands::{plan, simulate};
use clap::Parser as _;
use serde_json::Value;

fn json(arguments: &[&str]) -> Value {
    let mut out = vec![];
    match Cli::try_parse_from(arguments).unwrap().command {
        Command::Plan(arguments) => plan::run(&arguments, &mut out).unwrap(),
        Command::Simulate(arguments) => simulate::run(&arguments, &mut out).unwrap(),
        other => panic!("{other:?} is not tested here"),
    };
    serde_json::from_slice(&out).unwrap()
}

#[test]
fn the_articles_comparison_breaks_even_at_63_778_requests_a_day() {
    let plan = json(&["breakeven", "plan", "--preset", "seed-2023", "--format", "json"]);
    assert_eq!(plan["break_even_requests_per_day"], 63_778.0);
    let row = |requests: u64| {
        plan["rows"]
            .as_array()
            .unwrap()
            .iter()
            .find(|row| row["requests_per_day"] == requests)
            .unwrap()
            .clone()
    };
    let small = row(1_000);
    assert_eq!((&small["api_usd"], &small["self_hosted_usd"]), (&2.67.into(), &170.16.into()));
    assert_eq!(
        (small["cheaper"].as_str(), row(1_000_000)["cheaper"].as_str()),
        (Some("api"), Some("self_hosted"))
    );
    assert!(plan["note"].as_str().unwrap().contains("reconstruction"));
}

#[test]
fn a_volume_beyond_the_largest_fleet_shows_the_overflow() {
    let plan = json(&[
        "breakeven",
        "plan",
        "--max-replicas",
        "1",
        "--requests-per-day",
        "10000000",
        "--format",
        "json",
    ]);
    let row = &plan["rows"][0];
    assert_eq!(row["replicas"], 1);
    let overflow = row["overflow_api_usd"].as_f64().unwrap();
    assert!(overflow > 2000.0 && row["self_hosted_usd"].as_f64().unwrap() > overflow, "{row}");
}

#[test]
fn machines_that_are_paid_anyway_are_all_in_every_sum() {
    let plan =
        json(&["breakeven", "plan", "--billing", "committed", "--max-replicas", "3", "--format", "json"]);
    let row = &plan["rows"][0];
    let rent = 2.99 * 24.0 * 3.0;
    assert_eq!((&row["replicas"], &row["mix_replicas"]), (&3.into(), &3.into()));
    for cost in ["self_hosted_usd", "mix_usd"] {
        assert!((row[cost].as_f64().unwrap() - rent).abs() < 0.01, "{row}");
    }
}

#[test]
fn a_machine_that_is_paid_by_use_is_cheaper_always_or_never() {
    for (hourly, expected) in [("2.99", "break-even: always"), ("299", "break-even: never")] {
        let mut out = vec![];
        let arguments = ["breakeven", "plan", "--billing", "per_use", "--hourly-usd", hourly];
        let Command::Plan(arguments) = Cli::try_parse_from(arguments).unwrap().command else {
            panic!("it is a plan");
        };
        plan::run(&arguments, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(text.contains(expected), "{text}");
    }
}

/// How the program refuses: with status 2, a message, and no panic.
fn refusal(arguments: &[&str]) -> String {
    let program =
        std::process::Command::new(env!("CARGO_BIN_EXE_breakeven")).args(arguments).output().unwrap();
    let errors = String::from_utf8_lossy(&program.stderr).into_owned();
    assert_eq!(program.status.code(), Some(2), "{arguments:?}: {errors}");
    assert!(!errors.contains("panicked"), "{errors}");
    errors
}

#[test]
fn numbers_that_cannot_be_counted_are_refused() {
    let largest = u64::MAX.to_string();
    for arguments in [
        &["--requests-per-day", largest.as_str()][..],
        &["--input-tokens", "10000000000", "--output-tokens", "1"],
        &["--input-tokens", &largest, "--output-tokens", "1"],
        &["--input-tokens", "1000000000", "--requests-per-day", "1000000000000"],
        &["--hourly-usd", "9000000000"],
        &["--api-input-usd-per-million", "9000000000"],
        &["--max-replicas", "0"],
    ] {
        let _message = refusal(&[&["plan"], arguments].concat());
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("huge.csv").display().to_string();
    let header = "arrival_s,prompt_tokens,completion_tokens\n";
    std::fs::write(&path, format!("{header}0,{largest},1\n")).unwrap();
    assert!(refusal(&["simulate", &path]).contains("at most 100,000,000,000"));
    let row = "0,100000000000,100000000000\n";
    std::fs::write(&path, header.to_owned() + &row.repeat(20)).unwrap();
    let dear = ["--api-input-usd-per-million", "10000", "--api-output-usd-per-million", "10000"];
    let message = refusal(&[&["simulate", &path], &dear[..]].concat());
    assert!(message.contains("too large to be counted"), "{message}");
    std::fs::write(&path, format!("{header}1000000000,1,1\n")).unwrap();
    assert!(refusal(&["simulate", &path]).contains("days after the start"));
}

#[test]
fn a_preset_takes_no_other_numbers() {
    for (flag, value) in
        [("--hourly-usd", "1"), ("--input-tokens", "5"), ("--max-replicas", "3"), ("--billing", "per_use")]
    {
        let message = refusal(&["plan", "--preset", "seed-2023", flag, value]);
        assert!(message.contains("cannot be used with"), "{message}");
    }
}

#[test]
fn a_reconstruction_says_so_in_every_format() {
    let folder = tempfile::tempdir().unwrap();
    let picture = folder.path().join("seed.svg").display().to_string();
    let arguments =
        ["breakeven", "plan", "--preset", "seed-2023", "--format", "csv", "--plot", picture.as_str()];
    let Command::Plan(arguments) = Cli::try_parse_from(arguments).unwrap().command else {
        panic!("it is a plan");
    };
    let mut out = vec![];
    plan::run(&arguments, &mut out).unwrap();
    assert!(String::from_utf8(out).unwrap().lines().skip(1).all(|row| row.contains("a reconstruction")));
    assert!(std::fs::read_to_string(&picture).unwrap().contains("a reconstruction"));
}

/// Simulates traces of these rows, the first of which are the names of the columns.
fn simulated(folder: &std::path::Path, traces: &[(&str, &str)], flags: &[&str]) -> Value {
    let paths = traces.iter().map(|(name, rows)| {
        let path = folder.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, rows).unwrap();
        path.display().to_string()
    });
    let arguments: Vec<String> = ["breakeven", "simulate", "--format", "json"]
        .into_iter()
        .map(str::to_owned)
        .chain(paths)
        .chain(flags.iter().map(|flag| (*flag).to_owned()))
        .collect();
    json(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
}

const ROWS: &str = "arrival_s,prompt_tokens,completion_tokens\n0,9000000,9000000\n60,9000000,9000000\n";

#[test]
fn rows_that_are_sums_are_no_long_contexts() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("breakeven.toml");
    let text = r#"
        [backends.openai]
        kind = "api"
        base_url = "http://127.0.0.1:1/v1"
        [backends.gpu]
        kind = "self_hosted"
        base_url = "http://127.0.0.1:2/v1"
        hourly_usd = 2.99
        capacity = { input_tokens_per_second = 15000, output_tokens_per_second = 10000, max_in_flight = 2 }
        [routes.chat]
        models = ["gpt-5.4"]
        offers = [{ backend = "openai" }, { backend = "gpu", model = "llama" }]
        "#;
    std::fs::write(&config, text).unwrap();
    let bill = |flags: &[&str]| {
        let flags = [&["--config", config.to_str().unwrap(), "--policy", "api"], flags].concat();
        simulated(folder.path(), &[("rows.csv", ROWS)], &flags)["policies"][0]["total_usd"].as_f64().unwrap()
    };
    assert!(bill(&[]) > 1.2 * bill(&["--rows-are-sums"]), "{} {}", bill(&[]), bill(&["--rows-are-sums"]));
}

#[test]
fn traces_of_one_name_have_pictures_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let picture = folder.path().join("run.svg").display().to_string();
    let traces = [("a/rows.csv", ROWS), ("b/rows.csv", ROWS)];
    let both = simulated(folder.path(), &traces, &["--plot", &picture, "--policy", "api"]);
    assert_eq!((&both[0]["trace"], &both[1]["trace"]), (&"rows".into(), &"rows-2".into()));
    assert!(["run-rows.svg", "run-rows-2.svg"].iter().all(|name| folder.path().join(name).exists()));
}

#[test]
fn the_picture_of_committed_replicas_shows_whom_they_served() {
    let folder = tempfile::tempdir().unwrap();
    let picture = folder.path().join("run.svg").display().to_string();
    let flags = ["--billing", "committed", "--policy", "api,cheapest", "--plot", &picture];
    simulated(folder.path(), &[("rows.csv", ROWS)], &flags);
    let names = std::fs::read_to_string(&picture).unwrap();
    let lines = |name: &str| names.lines().filter(|line| line.trim() == name).count();
    assert_eq!((lines("api"), lines("cheapest")), (0, 1), "in the panel of replicas");
}

#[test]
fn a_schedule_is_that_of_adaptive_unless_policies_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("targets.csv").display().to_string();
    let busy: Vec<_> = (0..60).map(|minute| format!("{},9000000,9000000", minute * 60)).collect();
    let rows = format!("arrival_s,prompt_tokens,completion_tokens\n{}\n", busy.join("\n"));
    let targets = |flags: &[&str]| {
        simulated(folder.path(), &[("rows.csv", &rows)], &[&["--schedule", file.as_str()], flags].concat());
        std::fs::read_to_string(&file).unwrap()
    };
    let by_default = targets(&[]);
    assert_eq!(by_default, targets(&["--policy", "adaptive,api"]));
    assert!(by_default.lines().any(|target| target != "0"), "{by_default}");
}

#[test]
fn csv_says_whether_the_optimum_is_a_lower_bound() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.csv");
    std::fs::write(&path, ROWS).unwrap();
    for (minimum, expected) in [("1m", "false"), ("2h", "true")] {
        let arguments =
            ["breakeven", "simulate", path.to_str().unwrap(), "--format", "csv", "--minimum", minimum];
        let Command::Simulate(arguments) = Cli::try_parse_from(arguments).unwrap().command else {
            panic!("it is a simulation");
        };
        let mut out = vec![];
        simulate::run(&arguments, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let mut lines = text.lines().map(|line| line.rsplit(',').next().unwrap());
        assert_eq!((lines.next(), lines.next()), (Some("optimum_is_lower_bound"), Some(expected)));
    }
}

#[test]
fn a_simulation_has_the_promised_shape() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/traces/sgfull_s31_diurnal_minutes.csv.gz");
    let arguments = [
        "breakeven",
        "simulate",
        path,
        "--rho",
        "3",
        "--horizon",
        "14d",
        "--policy",
        "api,fixed,cheapest,lcp",
        "--format",
        "json",
    ];
    let result = json(&arguments);
    assert_eq!(result, json(&arguments));
    assert_eq!(
        (&result["slot_seconds"], &result["rho"], &result["max_replicas"]),
        (&60.into(), &3.0.into(), &4.into())
    );
    assert!((result["optimum_usd"].as_f64().unwrap() - 1343.01).abs() < 0.005);
    for (name, policy) in
        ["api", "fixed", "cheapest", "lcp"].iter().zip(result["policies"].as_array().unwrap())
    {
        assert_eq!(policy["name"], *name);
        let usd = |key: &str| policy[key].as_f64().unwrap();
        assert!((usd("total_usd") - usd("api_usd") - usd("rent_usd")).abs() < 1e-5);
        assert!(usd("ratio_to_optimum") >= 1.0);
        assert_eq!(
            policy["api_requests"].as_u64().unwrap() + policy["self_hosted_requests"].as_u64().unwrap(),
            19_790
        );
    }
}

#[test]
fn pictures_and_schedules_are_written() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/traces/syn_onoff30m_7d.csv.gz");
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name).display().to_string();
    let (picture, schedule) = (file("run.svg"), file("targets.csv"));
    json(&[
        "breakeven",
        "simulate",
        path,
        "--policy",
        "lcp,fixed",
        "--format",
        "json",
        "--plot",
        &picture,
        "--schedule",
        &schedule,
    ]);
    assert!(std::fs::read_to_string(&picture).unwrap().contains("</svg>"));
    let targets = std::fs::read_to_string(&schedule).unwrap();
    assert!(targets.lines().count() > 10_000 && targets.lines().all(|line| line.parse::<u32>().is_ok()));
    json(&["breakeven", "plan", "--format", "json", "--plot", &file("plan.svg")]);
    assert!(std::fs::read_to_string(file("plan.svg")).unwrap().contains("break-even"));
}

#[test]
fn a_comparison_calls_nobody_and_needs_no_secret() {
    let program = std::process::Command::new(env!("CARGO_BIN_EXE_breakeven"))
        .args(["plan", "--config", concat!(env!("CARGO_MANIFEST_DIR"), "/config/breakeven.toml")])
        .env_clear()
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&program.stderr);
    assert!(program.status.success(), "{errors}");
    assert!(String::from_utf8_lossy(&program.stdout).contains("break-even"));
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let mut program = std::process::Command::new(env!("CARGO_BIN_EXE_breakeven"))
        .args(["prices", "list"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // Closed before a word was read.
    drop(program.stdout.take());
    let ended = program.wait_with_output().unwrap();
    assert_eq!((ended.status.code(), String::from_utf8_lossy(&ended.stderr).as_ref()), (Some(0), ""));
}

#[test]
fn a_scale_beyond_what_amounts_can_hold_is_refused_and_not_wrapped() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/traces/syn_onoff30m_7d.csv.gz");
    for scale in [["--scale", "1e300"], ["--rho", "1e300"]] {
        let arguments = ["breakeven", "simulate", path, "--policy", "api", scale[0], scale[1]];
        let Command::Simulate(arguments) = Cli::try_parse_from(arguments).unwrap().command else {
            panic!("it is a simulation");
        };
        let refusal = simulate::run(&arguments, &mut Vec::<u8>::new()).unwrap_err();
        assert!(format!("{refusal:#}").contains("too large to be counted"), "{refusal:#}");
    }
}
