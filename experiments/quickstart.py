"""The quickstart as a script."""

from fedlora import simulate

if __name__ == "__main__":
    result = simulate("experiments/quickstart.toml", output="runs/quickstart-script")
    final = result.summary["final"]
    print(f"accuracy {final['accuracy']:.3f}, majority {final['majority']:.3f}")
    print(f"epsilon {result.summary['epsilon']['max']:.2f}")
    print(f"bytes up {result.summary['communication']['uplink_bytes']:,}")
